"""Causal attention of new tokens over keys and values in pages: the reference that faster ways are compared with."""

from __future__ import annotations

from collections.abc import Sequence
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
