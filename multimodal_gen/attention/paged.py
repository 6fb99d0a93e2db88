"""Causal attention of new tokens over keys and values in pages: the reference that faster ways are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class PagedSpan(Protocol):
    """New tokens of one sequence: `stop - start` of them, after `start` that came before."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def pages(self) -> Sequence[int]: ...
    @property
    def owner(self) -> int | None:
        """A number of the sequence's own; None: nothing is remembered of it between forwards."""


class PagedBatch(Protocol):
    """New tokens of several sequences, laid end to end: B of them, T tokens."""

    @property
    def spans(self) -> Sequence[PagedSpan]: ...
    @property
    def page_size(self) -> int: ...
    @property
    def positions(self) -> Tensor:
        """int64 [T]: of each token in its sequence."""

    @property
    def page_table(self) -> Tensor:
        """int32 [B, pages of the longest]."""

    @property
    def lengths(self) -> Tensor:
        """int32 [B]: tokens of each sequence, the new ones included."""


class Attend(Protocol):
    """Attention of one forward."""

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """q [T, H, D] → [T, H, D]. kv [T, 2, Hkv, D] are the new keys and values; they are in their pages by now."""


class PagedBackend(Protocol):
    """A way to compute it. What does not depend on the layer is made once per forward."""

    name: str
    copies: int  # bytes kept between forwards over those of the pages

    @staticmethod
    def fits(head_dim: int, dtype: torch.dtype) -> bool:
        """Whether it computes such heads on this machine."""

    def plan(self, batch: PagedBatch, cache: Sequence[Tensor]) -> Attend:
        """Attention for this batch over a model's cache: by layer, as of `paged_attention`."""

    def clear(self) -> None:
        """Let go of what is kept between forwards."""


@dataclass(frozen=True)
class _SpanBySpan:
    spans: Sequence[PagedSpan]
    cache: Sequence[Tensor]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        return paged_attention(q, self.cache[layer], self.spans)


class Reference:
    """Span by span."""

    name = "reference"
    copies = 0

    @staticmethod
    def fits(head_dim: int, dtype: torch.dtype) -> bool:
        """All."""
        return True

    def plan(self, batch: PagedBatch, cache: Sequence[Tensor]) -> Attend:
        """Nothing is made ahead."""
        return _SpanBySpan(batch.spans, cache)

    def clear(self) -> None:
        """Nothing is kept."""


def paged_attention(q: Tensor, cache: Tensor, spans: Sequence[PagedSpan]) -> Tensor:
    """Attention of each span's tokens over its sequence so far, themselves included; scale 1/√D.

    Args:
        q: [T, H, D], the spans' tokens in order.
        cache: [2, pages, Hkv, page_size, D]: keys and values, those of the new tokens included. Hkv divides H:
            neighbouring heads share keys (GQA: Ainslie et al., 2023).

    Returns: [T, H, D].
    """
    page_size, out, first = cache.shape[3], torch.empty_like(q), 0
    for span in spans:
        count = span.stop - span.start
        pages = torch.tensor(span.pages[: -(-span.stop // page_size)], device=q.device)
        k, v = cache[:, pages].transpose(1, 2).flatten(2, 3)[:, :, : span.stop]  # [Hkv, L, D]
        seen = torch.ones(count, span.stop, dtype=torch.bool, device=q.device).tril(span.start)
        own = q[first : first + count].transpose(0, 1)
        out[first : first + count] = F.scaled_dot_product_attention(
            own[None], k[None], v[None], seen, enable_gqa=k.shape[0] != own.shape[0]
        )[0].transpose(0, 1)
        first += count
    return out
