"""LoHa: `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b` (LyCORIS, peft)."""

from __future__ import annotations

from multimodal_gen.errors import CorruptAdapter
from multimodal_gen.lora.formats.parts import Parts
from multimodal_gen.lora.updates import Hadamard, Update

NAME = "loha"
ENDINGS = {rf"\.hada_w{n}_{x}(?:\.[\w-]+)?": f"w{n}_{x}" for n in (1, 2) for x in "ab"}
REFUSED = {r"\.hada_t[12].*": "a Tucker decomposition of a convolution"}


def make(parts: Parts) -> list[tuple[str, Update]]:
    """(parameter, update) pairs of one module. Raises: CorruptAdapter."""
    (up1, down1), (up2, down2) = parts.product("w1"), parts.product("w2")
    if up1.shape[0] != up2.shape[0] or down1.shape[1] != down2.shape[1]:
        raise CorruptAdapter(f"Module {parts.module[:120]!a} of the adapter: its two products differ in shape.")
    return [("weight", Hadamard(up1, down1, up2, down2, parts.scale(down1.shape[0])))]
