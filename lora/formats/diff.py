"""Whole differences: `.diff` (weight) and `.diff_b` (bias) of lightx2v, `.w_norm` and `.b_norm` of LyCORIS' norms."""

from __future__ import annotations

from multimodal_gen.errors import CorruptAdapter
from multimodal_gen.lora.formats.parts import Parts
from multimodal_gen.lora.updates import Full, Update

NAME = "diff"
ENDINGS = {r"\.(?:diff|w_norm)": "weight", r"\.(?:diff_b|b_norm)": "bias"}
REFUSED = {r"\.(?:set_weight|modules_to_save\..+)": "a whole weight, which would replace the model's own"}


def make(parts: Parts) -> list[tuple[str, Update]]:
    """(parameter, update) pairs of one module. Raises: CorruptAdapter."""
    for role, tensor in parts.tensors.items():
        if not tensor.is_floating_point():
            raise CorruptAdapter(
                f"Module {parts.module[:120]!a} of the adapter: the difference of its {role} is no float."
            )
    return [(role, Full(tensor)) for role, tensor in parts.tensors.items()]
