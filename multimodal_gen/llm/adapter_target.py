"""What adapters can change of a language model, and how training programs call it. No torch here.

All families have these modules, and their weights are known by the names of transformers whatever file they came from.
"""

from __future__ import annotations

from multimodal_gen.lora.names import AdapterTarget, Alias

_ATTENTION = r"(layers\.\d+\.self_attn)\.q_proj"
_MLP = r"(layers\.\d+\.mlp)\.gate_proj"
_QKV = tuple(rf"\1.{part}_proj" for part in "qkv")
_GATE_UP = tuple(rf"\1.{part}_proj" for part in ("gate", "up"))

# peft and all that is built on it write the names of transformers; fused ones are those of serving programs.
DECODER = AdapterTarget(
    tree="text",
    folder="",
    modules=(
        *(f"layers.0.self_attn.{part}_proj" for part in "qkvo"),
        *(f"layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
    ),
    aliases=(
        Alias(r"(layers\..+)", r"model.\1"),
        *(Alias(_ATTENTION, rf"{prefix}\1.qkv_proj", _QKV) for prefix in ("", "model.")),
        *(Alias(_MLP, rf"{prefix}\1.gate_up_proj", _GATE_UP) for prefix in ("", "model.")),
    ),
    strip=r"model\.",
)
