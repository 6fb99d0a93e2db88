"""Attention over pages on a CPU by the native kernel, which reads them where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal_gen.attention.paged import Attend, PagedBatch
from multimodal_gen.kernels.paged_attention import Spans, paged_attention, unavailable


@dataclass(frozen=True)
class _Plan:
    spans: Spans
    cache: Sequence[Tensor]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        return paged_attention(q, self.cache[layer], self.spans)


class NativePaged:
    """Nothing is kept between forwards."""

    name = "native"
    copies = 0

    @staticmethod
    def fits(head_dim: int, dtype: torch.dtype) -> bool:
        """Those that the kernel has vectors for."""
        return not unavailable(head_dim, dtype)

    def plan(self, batch: PagedBatch, cache: Sequence[Tensor]) -> Attend:
        """Spans of any lengths, in any order."""
        return _Plan(Spans.of(batch.spans, batch.page_size), cache)

    def clear(self) -> None:
        """Nothing is kept."""
