"""The body of Qwen3 (Yang et al., 2025) as a text encoder: states before its final norm.

Layers have the names and the arithmetic of transformers' Qwen3Model, so its checkpoints, adapters and tables of what
ranks share fit. It is here because importing transformers' takes longer than everything else that a small model's start
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.errors import CorruptModel
from multimodal_gen.kernels.gated_product import gated_product
from multimodal_gen.kernels.gated_residual import gated_residual_, gated_residual_norm_
from multimodal_gen.kernels.qk_norm_rope import qk_norm_rope_
from multimodal_gen.nn.norm import RMSNorm

MODEL_TYPE = "qwen3"
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads"),
)


@dataclass(frozen=True)
class Qwen3Config:
    """Of the checkpoint's config.json, whose names these are; filled by `read`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Qwen3Config | None:
        """None for a model with anything that is not computed here. Raises: CorruptModel for a damaged one."""
        rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta"), **_scaling(config)}
        plain = (
            config.get("model_type") == MODEL_TYPE
            and config.get("hidden_act", "silu") == "silu"
            and not config.get("attention_bias")
            and not config.get("use_sliding_window")
            and set(config.get("layer_types") or ()) <= {"full_attention"}
            and rope.get("rope_type", "default") == "default"
        )
        if not plain:
            return None
        values: dict[str, Any] = {name: config.get(name) for name in SIZES}
        values |= {"rms_norm_eps": config.get("rms_norm_eps"), "rope_theta": rope.get("rope_theta")}
        for name, value in values.items():
            if type(value) not in ((int,) if name in SIZES else (int, float)) or value <= 0:
                raise CorruptModel(f"text_encoder/config.json: {name} must be a number above 0, not {value!r}.")
        if values["num_attention_heads"] % values["num_key_value_heads"] or values["head_dim"] % 2:
            raise CorruptModel(
                f"text_encoder/config.json: {values['num_key_value_heads']} heads of keys must divide "
                f"{values['num_attention_heads']} heads, and a head have an even number, not {values['head_dim']}."
            )
        return cls(**values)


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Older checkpoints say apart how positions are stretched."""
    scaling = config.get("rope_scaling")
    return {} if scaling is None else {"rope_type": scaling.get("rope_type", scaling.get("type", "unknown"))}


class Attention(nn.Module):
    """Causal attention of one sequence; heads of keys are shared by groups of queries."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        width, dim = config.hidden_size, config.head_dim
        self.dim = dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, width, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """x [l, D]; turns float32 [l, 2, head / 2]."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        for states, norm in ((q, self.q_norm), (k, self.k_norm)):
            qk_norm_rope_(states[:, None], norm.weight[None], turns, norm.eps, pairs="halves")
        groups = q.shape[1] // k.shape[1]
        q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))  # [1, heads, l, head]
        k, v = (states.repeat_interleave(groups, 1) for states in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed[0].transpose(0, 1).flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated_product(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """Attention and a feed-forward network, each added to what it reads."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """x [l, D] → [l, D], overwritten."""
        h = self.self_attn(self.input_layernorm(x), turns)
        h = gated_residual_norm_(x, h, None, None, None, self.post_attention_layernorm.as_norm())
        return gated_residual_(x, self.mlp(h), None, None)


class Qwen3Body(nn.Module):
    """Token ids → states before the final norm."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        # Not drawn at random: on the meta device that alone imports torch's compiler, a second of every start.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [l] → [l, D]."""
        x = self.embed_tokens(ids)
        turns = self._turns(len(ids), x.device)
        for layer in self.layers:
            x = layer(x, turns)
        return x

    def _turns(self, length: int, device: torch.device) -> Tensor:
        """float32 [length, 2, head / 2]: cosines and sines."""
        dim = self.config.head_dim
        steps = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        frequencies = (1.0 / (self.config.rope_theta**steps)).to(device)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
        return torch.stack((angles.cos(), angles.sin()), 1)
