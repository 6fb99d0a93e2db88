"""How a language model attends: new keys and values go into their pages, then each token looks back at its sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal_gen.attention.decode_window import DecodeWindow, LanePlan, OwnedSpan
from multimodal_gen.attention.paged import paged_attention


@dataclass(frozen=True)
class CachedPlan:
    """One forward's spans, sorted out once for all layers."""

    pages: Tensor  # int64 [T]: where each token's key and value go
    offsets: Tensor  # int64 [T]
    decoding: int  # the first spans of the batch, one token each, go through the window
    lanes: tuple[LanePlan, ...]
    others: Sequence[OwnedSpan]


class WindowedAttention:
    """On a CPU: single tokens over a dense copy of their sequence, longer spans over their pages."""

    def __init__(self, cache: Sequence[Tensor], window: DecodeWindow, window_bytes: int) -> None:
        """
        Args:
            cache: by layer [2, pages, Hkv, page_size, D].
            window_bytes: memory that the dense copies may take; sequences beyond it read their pages.
        """
        self._cache, self._window, self._most = cache, window, window_bytes

    def begin(self, spans: Sequence[OwnedSpan], slots: Tensor) -> CachedPlan:
        """Sort out a forward. `slots` int64 [T] = page · page_size + offset; single tokens come first."""
        page_size, room, decoding = self._cache[0].shape[3], self._most // self._window.token_bytes, 0
        for span in spans:
            if span.stop - span.start != 1 or span.owner is None or span.stop * 2 > room:
                break
            room -= span.stop * 2  # rooms are up to a quarter larger than what is in them, and grow by doubling
            decoding += 1
        lanes = self._window.begin(spans[:decoding], self._cache) if decoding else []
        pages = torch.div(slots, page_size, rounding_mode="floor")
        return CachedPlan(pages, slots - pages * page_size, decoding, tuple(lanes), spans[decoding:])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: CachedPlan) -> Tensor:
        """q [T, H, D], k and v [T, Hkv, D] → [T, H, D]; k and v are in the pages afterwards."""
        pool, n = self._cache[layer], plan.decoding
        pool[0][plan.pages, :, plan.offsets] = k
        pool[1][plan.pages, :, plan.offsets] = v
        parts = []
        if n:
            parts.append(self._window.attend(plan.lanes, layer, q[:n], k[:n], v[:n]))
        if plan.others:
            parts.append(paged_attention(q[n:], pool, plan.others))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
