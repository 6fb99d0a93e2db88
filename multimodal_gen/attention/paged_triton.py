"""Attention over pages on CUDA: single tokens by the Triton kernel, longer spans one by one over their pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal_gen.attention.paged import Attend, PagedBatch, PagedSpan, paged_attention
from multimodal_gen.kernels import native
from multimodal_gen.kernels.paged_decode import paged_decode, splits_for


@dataclass(frozen=True)
class _Plan:
    """One forward, sorted out for all layers."""

    decoding: int  # the first spans of the batch, one token each
    page_table: Tensor
    lengths: Tensor
    longest: int
    splits: int
    others: Sequence[PagedSpan]
    cache: Sequence[Tensor]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        n, pool, parts = self.decoding, self.cache[layer], []
        if n:
            parts.append(paged_decode(q[:n], pool, self.page_table, self.lengths, self.splits, self.longest))
        if self.others:
            parts.append(paged_attention(q[n:], pool, self.others))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TritonPaged:
    """Nothing is kept between forwards."""

    name = "triton"
    copies = 0

    @staticmethod
    def fits(head_dim: int, dtype: torch.dtype) -> bool:
        """All, unless kernels of ours are switched off."""
        return not native.switched_off()

    def plan(self, batch: PagedBatch, cache: Sequence[Tensor]) -> Attend:
        """Only single tokens at the front of the batch go through the kernel."""
        spans, decoding = batch.spans, 0
        while decoding < len(spans) and spans[decoding].stop - spans[decoding].start == 1:
            decoding += 1
        longest = max((span.stop for span in spans[:decoding]), default=0)
        return _Plan(
            decoding=decoding,
            page_table=batch.page_table[:decoding],
            lengths=batch.lengths[:decoding],
            longest=longest,
            splits=splits_for(decoding, cache[0].shape[2], longest, _processors(cache[0].device)) if decoding else 1,
            others=spans[decoding:],
            cache=cache,
        )

    def clear(self) -> None:
        """Nothing is kept."""


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
