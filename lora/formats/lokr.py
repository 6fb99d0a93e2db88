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
    outer, inner = _factor(parts, "w1"), _factor(parts, "w2")
    rank = next((factors[1].shape[0] for factors in (inner, outer) if len(factors) == 2), 0)
    return [("weight", Kronecker(outer, inner, parts.scale(rank), rank))]


def _factor(parts: Parts, role: str) -> tuple[Tensor, ...]:
    return (parts.matrix(role),) if role in parts.tensors else parts.product(role)
