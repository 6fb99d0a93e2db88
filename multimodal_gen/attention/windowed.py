"""Attention over pages on a CPU: single tokens over a dense copy of their sequence, longer spans one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.attention.decode_window import DecodeWindow, LanePlan, room_for
from multimodal_gen.attention.paged import Attend, PagedBatch, PagedSpan


@dataclass(frozen=True)
class _Lanes:
    """The first `count` tokens of the batch: sequences that have a dense copy."""

    window: DecodeWindow
    plans: Sequence[LanePlan]
    count: int

    def __call__(self, layer: int, pool: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return self.window.attend(self.plans, layer, q, kv)


@dataclass(frozen=True)
class _Gathered:
    """The next `count` tokens: single ones of sequences that no copy has room for; their pages are put together."""

    pages: Tensor  # int64 [count · pages of the longest]
    behind: Tensor  # bool [count, 1, 1, tokens of those pages]: within the sequence
    others: Tensor  # bool [count, 1, tokens of those pages, 1]: not within it
    count: int

    def __call__(self, layer: int, pool: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        found = pool.index_select(1, self.pages).unflatten(1, (self.count, -1))
        # What others left in a page may be no numbers, which no mask takes out of a sum.
        k, v = found.transpose(2, 3).flatten(3, 4).masked_fill_(self.others, 0.0)  # [count, Hkv, L, D]
        grouped = q.unflatten(1, (k.shape[1], -1))  # neighbouring heads share keys
        return F.scaled_dot_product_attention(grouped, k, v, self.behind).flatten(1, 2)


@dataclass(frozen=True)
class _Chunk:
    """The next `count` tokens: of one sequence. One that begins here needs no pages, but what it has just made."""

    pages: Tensor | None  # int64 [pages of the sequence]
    seen: Tensor | None  # bool [count, L]
    count: int

    def __call__(self, layer: int, pool: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if self.pages is None or self.seen is None:
            k, v = kv.transpose(0, 1).transpose(1, 2)  # [Hkv, count, D]
        else:
            k, v = pool.index_select(1, self.pages).transpose(1, 2).flatten(2, 3)[:, :, : self.seen.shape[1]]
        own, causal = q.transpose(0, 1)[None], self.seen is None
        many = own.shape[1] != k.shape[0]
        mixed = F.scaled_dot_product_attention(own, k[None], v[None], self.seen, is_causal=causal, enable_gqa=many)
        return mixed[0].transpose(0, 1)


@dataclass(frozen=True)
class _Plan:
    """One forward, sorted out for all layers."""

    parts: Sequence[_Lanes | _Gathered | _Chunk]
    cache: Sequence[Tensor]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        counts, pool = [part.count for part in self.parts], self.cache[layer]
        shares = zip(self.parts, q.split(counts), kv.split(counts), strict=True)
        mixed = [part(layer, pool, own, new) for part, own, new in shares]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


class Windowed:
    """The backend of one model, with its copies."""

    name = "windowed"
    copies = 1

    @staticmethod
    def fits(head_dim: int, dtype: torch.dtype) -> bool:
        """All."""
        return True

    def __init__(self, most_bytes: int | None = None) -> None:
        """`most_bytes`: memory of the copies; sequences beyond it read their pages. None: as much as the pages have."""
        self._most = most_bytes
        self._window: DecodeWindow | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the copies."""
        return 0 if self._window is None else self._window.nbytes

    def plan(self, batch: PagedBatch, cache: Sequence[Tensor]) -> Attend:
        """Bring the copies up to date. Single tokens are computed together where they are at the front of the batch."""
        window, spans = self._window_of(cache), batch.spans
        room = (sum(pool.nbytes for pool in cache) if self._most is None else self._most) // window.token_bytes
        singles = next((at for at, span in enumerate(spans) if span.stop - span.start != 1), len(spans))
        copied = 0
        for span in spans[:singles]:
            room -= room_for(span.stop)
            if span.owner is None or room < 0:
                break
            copied += 1
        parts: list[_Lanes | _Gathered | _Chunk] = []
        if copied:
            parts.append(_Lanes(window, window.begin(spans[:copied], cache), copied))
        if singles > copied:
            parts.append(_gathered(spans[copied:singles], batch.page_size))
        parts += [_chunk(span, batch.page_size) for span in spans[singles:]]
        return _Plan(parts, cache)

    def clear(self) -> None:
        """Give the copies' memory back."""
        self._window = None

    def _window_of(self, cache: Sequence[Tensor]) -> DecodeWindow:
        if self._window is None:
            self._window = DecodeWindow(len(cache), cache[0].shape[2], cache[0].shape[4], cache[0].dtype)
        return self._window


def _gathered(spans: Sequence[PagedSpan], page_size: int) -> _Gathered:
    width = max(-(-span.stop // page_size) for span in spans)
    rows = [list(span.pages[: -(-span.stop // page_size)]) for span in spans]
    pages = torch.tensor([row + [0] * (width - len(row)) for row in rows]).flatten()
    stops = torch.tensor([span.stop for span in spans])
    within = torch.arange(width * page_size) < stops[:, None]
    return _Gathered(pages, within[:, None, None], ~within[:, None, :, None], len(spans))


def _chunk(span: PagedSpan, page_size: int) -> _Chunk:
    count = span.stop - span.start
    if span.start == 0:
        return _Chunk(None, None, count)
    pages = torch.tensor(span.pages[: -(-span.stop // page_size)])
    return _Chunk(pages, torch.ones(count, span.stop, dtype=torch.bool).tril(span.start), count)
