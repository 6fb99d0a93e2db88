"""Causal attention of new tokens over keys and values in pages, straight from the pages, in C++ on a CPU.

Any number of new tokens per sequence: one in decoding, a chunk of the prompt in prefill. Queries that share keys (GQA:
Ainslie et al., 2023; and up to five tokens of a chunk) read them once; scores and sums are float32, with a running
maximum (Milakov and Gimelshein, 2018). Bytes: keys and values of each sequence once per sixteen queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels import native

MULTIPLE, MOST_DIM = 32, 256  # of a head's width

_paged_attention = native.Function("paged_attention", "pppppiiiiiiif")


class NewTokens(Protocol):
    """Of one sequence: `stop - start` of them, after `start` that came before."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def pages(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Spans:
    """New tokens of several sequences, laid end to end."""

    table: Tensor  # int32 [B, 4]: first row in the batch, tokens before, new tokens, first place in `pages`
    pages: Tensor  # int32: of all sequences, one after the other

    @classmethod
    def of(cls, spans: Sequence[NewTokens], page_size: int) -> Spans:
        """On the CPU."""
        rows, pages, first = list[tuple[int, int, int, int]](), list[int](), 0
        for span in spans:
            rows.append((first, span.start, span.stop - span.start, len(pages)))
            pages += span.pages[: -(-span.stop // page_size)]
            first += span.stop - span.start
        return cls(torch.tensor(rows, dtype=torch.int32).view(-1, 4), torch.tensor(pages, dtype=torch.int32))


def unavailable(head_dim: int, dtype: torch.dtype) -> str:
    """Why heads of this width cannot be computed natively, or an empty string."""
    if head_dim % MULTIPLE or head_dim > MOST_DIM:
        return f"heads are {head_dim} wide, not a multiple of {MULTIPLE} up to {MOST_DIM}"
    if _paged_attention.of(torch.empty(0, dtype=dtype, device="cpu")) is None:
        return native.unavailable() or f"there is no kernel for {dtype}"
    return ""


def paged_attention(q: Tensor, cache: Tensor, spans: Spans) -> Tensor:
    """Attention of each span's tokens over its sequence so far, themselves included; scale 1/√D.

    Args:
        q: [T, H, D], heads side by side; rows of any stride.
        cache: [2, pages, Hkv, page_size, D]: keys and values, those of the new tokens included; Hkv divides H.
        spans: T tokens in all.

    Returns: [T, H, D].
    """
    _check(q, cache, spans)
    compute = _paged_attention.of(q)
    if compute is None or unavailable(q.shape[2], q.dtype):
        return reference(q, cache, spans)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    compute(
        cache.data_ptr(),
        q.data_ptr(),
        out.data_ptr(),
        spans.table.data_ptr(),
        spans.pages.data_ptr(),
        len(spans.table),
        q.stride(0),
        q.shape[1],
        *cache.shape[1:],
        q.shape[2] ** -0.5,
    )
    return out


def _check(q: Tensor, cache: Tensor, spans: Spans) -> None:
    assert q.dim() == 3, q.shape
    assert cache.dim() == 5, cache.shape
    assert cache.shape[0] == 2, cache.shape
    assert cache.shape[4] == q.shape[2], (q.shape, cache.shape)
    assert q.shape[1] % cache.shape[2] == 0, f"{cache.shape[2]} heads of keys do not divide {q.shape[1]}"
    assert q.stride(2) == 1, q.stride()
    assert q.stride(1) == q.shape[2], f"heads lie {q.stride(1)} numbers apart, not side by side"
    assert cache.is_contiguous(), cache.stride()
    assert q.dtype == cache.dtype, (q.dtype, cache.dtype)
    assert q.device == cache.device == spans.table.device, (q.device, cache.device, spans.table.device)
    assert spans.table.dtype == spans.pages.dtype == torch.int32, (spans.table.dtype, spans.pages.dtype)


def reference(q: Tensor, cache: Tensor, spans: Spans) -> Tensor:
    """The same, sequence by sequence, in float32 steps, rounded once."""
    size, out = cache.shape[3], torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for row, start, count, first in spans.table.tolist():
        stop = start + count
        pages = spans.pages[first : first - (-stop // size)].long()
        k, v = cache[:, pages].transpose(1, 2).flatten(2, 3)[:, :, :stop].float()  # [Hkv, L, D]
        seen = torch.ones(count, stop, dtype=torch.bool, device=q.device).tril(start)
        own, shared = q[row : row + count].transpose(0, 1).float(), k.shape[0] != q.shape[1]
        mixed = F.scaled_dot_product_attention(own[None], k[None], v[None], seen, enable_gqa=shared)
        out[row : row + count] = mixed[0].transpose(0, 1).to(q.dtype)
    return out
