"""LoKr: `lokr_w1` and `lokr_w2`, each whole or as a product `_a`, `_b` (LyCORIS, peft)."""

from __future__ import annotations

from torch import Tensor

from multimodal_gen.lora.formats.parts import Parts
from multimodal_gen.lora.updates import Kronecker, Update

NAME = "lokr"
ENDINGS = {rf"\.lokr_w{n}{x}(?:\.[\w-]+)?": f"w{n}{x}" for n in (1, 2) for x in ("", "_a", "_b")}
REFUSED = {r"\.lokr_t2.*": "a Tucker decomposition of a convolution"}


def make(parts: Parts) -> list[tuple[str, Update]]:
    """(parameter, update) pairs of one module. Raises: CorruptAdapter."""
    outer, outer_rank = _factor(parts, "w1")
    inner, inner_rank = _factor(parts, "w2")
    rank = inner_rank or outer_rank
    # With both factors whole there is no rank to divide alpha by, and LyCORIS ignores it.
    return [("weight", Kronecker(outer, inner, parts.scale(rank) if rank else 1.0, rank))]


def _factor(parts: Parts, role: str) -> tuple[Tensor, int]:
    if role in parts.tensors:
        return parts.matrix(role), 0
    a, b = parts.product(role)
    return a.float() @ b.float(), b.shape[0]
