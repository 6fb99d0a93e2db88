"""Attention over pages on CUDA: single tokens by one Triton kernel, longer spans all together by another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal_gen.attention.paged import Attend, PagedBatch, PagedSpan, paged_attention
from multimodal_gen.kernels import native
from multimodal_gen.kernels.packed_attention import packed_attention
from multimodal_gen.kernels.paged_decode import paged_decode, splits_for


@dataclass(frozen=True)
class _Longer:
    """Spans of several tokens: the keys and values of their sequences are put side by side."""

    lengths: tuple[int, ...]  # new tokens
    key_lengths: tuple[int, ...]  # tokens of the sequences, the new ones included
    at: tuple[Tensor, Tensor] | None  # page and place in it of every key, int64 [K]; None: all keys are new

    @classmethod
    def of(cls, spans: Sequence[PagedSpan], page_size: int, device: torch.device) -> _Longer:
        """On the device, once for all layers."""
        lengths, keys = tuple(span.stop - span.start for span in spans), tuple(span.stop for span in spans)
        if lengths == keys:
            return cls(lengths, keys, None)
        pages = torch.cat([torch.tensor(span.pages)[torch.arange(span.stop) // page_size] for span in spans])
        places = torch.cat([torch.arange(span.stop) % page_size for span in spans])
        both = torch.stack([pages, places]).to(device)
        return cls(lengths, keys, (both[0], both[1]))

    def __call__(self, q: Tensor, kv: Tensor, pool: Tensor) -> Tensor:
        k, v = (kv if self.at is None else pool[:, self.at[0], :, self.at[1]]).unbind(1)  # [K, Hkv, D]
        return packed_attention(q, k, v, self.lengths, self.key_lengths, causal=True)


@dataclass(frozen=True)
class _Plan:
    """One forward, sorted out for all layers."""

    decoding: int  # the first spans of the batch, one token each
    page_table: Tensor
    lengths: Tensor
    longest: int
    splits: int
    longer: _Longer | None
    others: Sequence[PagedSpan]  # the same spans, for heads that are too wide
    cache: Sequence[Tensor]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        n, pool, parts = self.decoding, self.cache[layer], []
        if n:
            parts.append(paged_decode(q[:n], pool, self.page_table, self.lengths, self.splits, self.longest))
        if self.longer is not None:
            parts.append(self.longer(q[n:], kv[n:], pool))
        elif self.others:
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

    def plan_decoding(self, page_table: Tensor, lengths: Tensor, longest: int, cache: Sequence[Tensor]) -> Attend:
        """For single tokens, of which only tensors tell: int32 [B, pages], [B]; none is longer than `longest`."""
        splits = splits_for(len(lengths), cache[0].shape[2], longest, _processors(cache[0].device))
        return _Plan(len(lengths), page_table, lengths, longest, splits, None, (), cache)

    def plan(self, batch: PagedBatch, cache: Sequence[Tensor]) -> Attend:
        """Single tokens stand at the front of a batch."""
        from multimodal_gen.kernels.gpu.packed_attention import MOST

        spans, decoding, pool = batch.spans, 0, cache[0]
        while decoding < len(spans) and spans[decoding].stop - spans[decoding].start == 1:
            decoding += 1
        longest = max((span.stop for span in spans[:decoding]), default=0)
        others = spans[decoding:]
        narrow = pool.shape[4] <= MOST[pool.dtype]
        return _Plan(
            decoding=decoding,
            page_table=batch.page_table[:decoding],
            lengths=batch.lengths[:decoding],
            longest=longest,
            splits=splits_for(decoding, pool.shape[2], longest, _processors(pool.device)) if decoding else 1,
            longer=_Longer.of(others, batch.page_size, pool.device) if others and narrow else None,
            others=others,
            cache=cache,
        )

    def clear(self) -> None:
        """Nothing is kept."""


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
