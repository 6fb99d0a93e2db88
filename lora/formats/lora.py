"""LoRA and DoRA: `lora_A`/`lora_B` (peft, diffusers), `lora_down`/`lora_up` (kohya, ComfyUI), `lora.down`/`lora.up`."""

from __future__ import annotations

from multimodal_gen.errors import AdapterError, CorruptAdapter
from multimodal_gen.lora.formats.parts import Parts
from multimodal_gen.lora.updates import Decomposed, Full, LowRank, Update

NAME = "lora"
# peft puts an adapter's name before `weight` when it saves a whole model.
ENDINGS = {
    r"\.lora_A\.(?:[\w-]+\.)?weight": "down",
    r"\.lora_B\.(?:[\w-]+\.)?weight": "up",
    r"\.lora_B\.(?:[\w-]+\.)?bias": "bias",
    r"\.(?:lora_down|lora\.down)\.weight": "down",
    r"\.(?:lora_up|lora\.up)\.weight": "up",
    r"\.(?:lora_up|lora\.up)\.bias": "bias",
    r"\.(?:dora_scale|lora_magnitude_vector(?:\.[\w-]+)?(?:\.weight)?)": "magnitude",
}
REFUSED = {
    r"\.lora_mid\.weight": "a Tucker decomposition of a convolution",
    r"\.lora_embedding_[AB].*": "an embedding",
    r"\.reshape_weight": "a layer whose shape the adapter changes",
}


def make(parts: Parts) -> list[tuple[str, Update]]:
    """(parameter, update) pairs of one module. Raises: CorruptAdapter, AdapterError."""
    down, up = parts.matrix("down"), parts.matrix("up")
    scale = parts.scale(parts.check_rank(down, up))
    update: Update = LowRank(down, up, scale)
    magnitude, bias = parts.tensors.get("magnitude"), parts.tensors.get("bias")
    if magnitude is not None:
        # [1, in] would be a norm along the other axis; where in = out only the shape tells.
        if magnitude.shape[:1] != up.shape[:1] or magnitude.numel() != up.shape[0]:
            raise AdapterError(
                f"Module {parts.module[:120]!a} of the adapter: a DoRA magnitude must have one number for each of the "
                f"{up.shape[0]} outputs, this one has shape {list(magnitude.shape)}; along inputs it is not supported."
            )
        update = Decomposed(update, magnitude.reshape(-1))
    if bias is None:
        return [("weight", update)]
    if magnitude is not None:
        raise AdapterError(f"Module {parts.module[:120]!a} of the adapter has both a bias and a magnitude.")
    if bias.shape != up.shape[:1]:
        raise CorruptAdapter(f"Module {parts.module[:120]!a} of the adapter: its bias has shape {list(bias.shape)}.")
    return [("weight", update), ("bias", Full(bias.float() * scale))]
