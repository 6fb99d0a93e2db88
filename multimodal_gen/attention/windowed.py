"""Attention over pages on a CPU: single tokens over a dense copy of their sequence, longer spans over their pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal_gen.attention.decode_window import DecodeWindow, LanePlan
from multimodal_gen.attention.paged import Attend, PagedBatch, PagedSpan, paged_attention


@dataclass(frozen=True)
class _Plan:
    """One forward, sorted out for all layers."""

    window: DecodeWindow | None  # None: no span goes through it
    decoding: int  # the first spans of the batch, one token each, do
    lanes: Sequence[LanePlan]
    others: Sequence[PagedSpan]
    cache: Sequence[Tensor]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        n, parts = self.decoding, []
        if self.window is not None:
            parts.append(self.window.attend(self.lanes, layer, q[:n], kv[:n]))
        if self.others:
            parts.append(paged_attention(q[n:], self.cache[layer], self.others))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Windowed:
    """The backend of one model, with its copies."""

    name = "windowed"

    def __init__(self, most_bytes: int | None = None) -> None:
        """`most_bytes`: memory of the copies; sequences beyond it read their pages. None: as much as the pages have."""
        self._most = most_bytes
        self._window: DecodeWindow | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the copies."""
        return 0 if self._window is None else self._window.nbytes

    def plan(self, batch: PagedBatch, cache: Sequence[Tensor]) -> Attend:
        """Bring the copies up to date. Only single tokens at the front of the batch go through them."""
        if self._window is None:
            heads, dim = cache[0].shape[2], cache[0].shape[4]
            self._window = DecodeWindow(len(cache), heads, dim, cache[0].dtype)
        most = sum(pool.nbytes for pool in cache) if self._most is None else self._most
        room, decoding = most // self._window.token_bytes, 0
        for span in batch.spans:
            room -= 2 * span.stop  # rows are up to a quarter longer than what is in them, and grow by doubling
            if span.stop - span.start != 1 or span.owner is None or room < 0:
                break
            decoding += 1
        if not decoding:
            return _Plan(None, 0, (), batch.spans, cache)
        lanes = self._window.begin(batch.spans[:decoding], cache)
        return _Plan(self._window, decoding, lanes, batch.spans[decoding:], cache)

    def clear(self) -> None:
        """Give the copies' memory back."""
        self._window = None
