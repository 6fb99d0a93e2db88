"""A backend that compilers leave alone: it looks at lengths, may talk to other ranks, and is one call."""

from __future__ import annotations

from torch import Tensor

from multimodal_gen.attention.base import AttentionBackend
from multimodal_gen.attention.segments import Segments
from multimodal_gen.kernels.eager import eager_break


class ApartAttention:
    """Another backend, between compiled regions."""

    def __init__(self, backend: AttentionBackend, *, recorded: bool = True) -> None:
        """`recorded`: graphs hold it; not where it talks to other ranks."""
        self.name = backend.name
        self._backend, self._recorded = backend, recorded

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v [T, H, D] → [T, H, D]."""
        return (_inside if self._recorded else _between)(self._backend, q, k, v, segments)


@eager_break(recorded=True)
def _inside(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return backend(q, k, v, segments)


@eager_break
def _between(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return backend(q, k, v, segments)
