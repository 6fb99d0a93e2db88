"""A backend that compilers and graphs leave alone: it looks at lengths, may talk to other ranks, and is one call."""

from __future__ import annotations

from torch import Tensor

from multimodal_gen.attention.base import AttentionBackend
from multimodal_gen.attention.segments import Segments
from multimodal_gen.kernels.eager import eager_break


class ApartAttention:
    """Another backend, between compiled or recorded regions."""

    def __init__(self, backend: AttentionBackend) -> None:
        self.name = backend.name
        self._backend = backend

    @eager_break
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v [T, H, D] → [T, H, D]."""
        return self._backend(q, k, v, segments)
