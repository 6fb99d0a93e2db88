"""Attention of one new token per sequence over keys and values in pages, on CUDA, in Triton.

A program computes all queries that share a head of keys (GQA) over one part of a sequence, with a running maximum
(Milakov and Gimelshein, 2018). Where sequences are too few to fill the processor they are split into several parts,
whose results are joined by their log-sum-exp in a second kernel (Flash-Decoding: Dao et al., 2023). Their number is no
constant of the kernels: it changes as texts grow and leave, and compiling takes a second.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # tokens that a program reads at a time
LEAST = 16  # rows that tl.dot wants
SPLIT = 256  # tokens of the smallest part
MAX_SPLITS = 32


@triton.jit
def _decode(
    q_ptr,
    cache_ptr,
    table_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    q_token,  # strides, in numbers
    cache_side,
    cache_page,
    cache_head,
    cache_slot,
    table_row,
    scale,
    part_tiles,  # tiles of each part
    splits,
    heads: tl.constexpr,
    group: tl.constexpr,  # heads that share keys
    rows: tl.constexpr,  # at least `group`
    dim: tl.constexpr,
    width: tl.constexpr,  # at least `dim`
    page_size: tl.constexpr,
    tile: tl.constexpr,
    split: tl.constexpr,
):
    """Program (sequence, head of keys, part). out is float32 [B, H, splits, dim], lse [B, H, splits]; without `split`
    there is one part, out has the dtype of q, and there is no lse."""
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + sequence)
    first = part * part_tiles * tile
    last = tl.minimum(length, first + part_tiles * tile)

    row, column = tl.arange(0, rows), tl.arange(0, width)
    head = kv_head * group + row
    own = (row < group)[:, None] & (column < dim)[None, :]
    q = tl.load(q_ptr + sequence * q_token + head[:, None] * dim + column[None, :], mask=own, other=0.0)

    top = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    mixed = tl.zeros((rows, width), tl.float32)
    for start in range(first, last, tile):
        token = start + tl.arange(0, tile)
        here = token < last
        page = tl.load(table_ptr + sequence * table_row + token // page_size, mask=here, other=0).to(tl.int64)
        at = cache_ptr + page * cache_page + kv_head * cache_head + (token % page_size) * cache_slot
        inside = here[None, :] & (column < dim)[:, None]  # [width, tile]
        keys = tl.load(at[None, :] + column[:, None], mask=inside, other=0.0)
        scores = tl.dot(q, keys, input_precision="ieee") * scale
        scores = tl.where(here[None, :], scores, float("-inf"))
        now = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - now[:, None])
        shrink = tl.exp(top - now)
        inside = here[:, None] & (column < dim)[None, :]  # [tile, width]
        values = tl.load(at[:, None] + cache_side + column[None, :], mask=inside, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        top = now

    # A part behind the end of its sequence is empty: it gets the weight exp(-inf).
    full = total > 0
    safe = tl.where(full, total, 1.0)
    place = (sequence * heads + head) * splits + part
    tl.store(
        out_ptr + place[:, None] * dim + column[None, :], (mixed / safe[:, None]).to(out_ptr.dtype.element_ty), mask=own
    )
    if split:
        tl.store(lse_ptr + place, tl.where(full, top + tl.log(safe), float("-inf")), mask=row < group)


@triton.jit
def _join(
    parts_ptr,
    lse_ptr,
    out_ptr,
    splits,
    count: tl.constexpr,  # at least `splits`
    dim: tl.constexpr,
    width: tl.constexpr,
):
    """Program (sequence · heads + head): the parts, weighted by exp(lse). The first part is never empty."""
    row, part, column = tl.program_id(0), tl.arange(0, count), tl.arange(0, width)
    lse = tl.load(lse_ptr + row * splits + part, mask=part < splits, other=float("-inf"))
    weights = tl.exp(lse - tl.max(lse, 0))
    weights = weights / tl.sum(weights, 0)
    inside = (part < splits)[:, None] & (column < dim)[None, :]
    found = tl.load(parts_ptr + (row * splits + part[:, None]) * dim + column[None, :], mask=inside, other=0.0)
    mixed = tl.sum(found * weights[:, None], 0)
    tl.store(out_ptr + row * dim + column, mixed.to(out_ptr.dtype.element_ty), mask=column < dim)


def splits_for(sequences: int, kv_heads: int, longest: int, processors: int) -> int:
    """Parts that sequences are split into: enough programs for two on each processor, none shorter than `SPLIT`."""
    wanted = triton.cdiv(2 * processors, sequences * kv_heads)
    return max(1, min(wanted, triton.cdiv(longest, SPLIT), MAX_SPLITS))


def paged_decode(q: Tensor, cache: Tensor, page_table: Tensor, lengths: Tensor, splits: int, longest: int) -> Tensor:
    """softmax(q · Kᵀ / √D) · V over each sequence's pages.

    Args:
        q: [B, H, D], one token per sequence; heads lie beside one another.
        cache: [2, pages, Hkv, page_size, D]: keys and values, those of the new tokens included; Hkv divides H.
        page_table: int32 [B, pages]; entries behind a sequence's end are not read.
        lengths: int32 [B], at least 1: tokens of each sequence.
        splits: parts that each sequence is split into (`splits_for`).
        longest: the largest of lengths, known without asking the device.

    Returns: [B, H, D] in the dtype of q.
    """
    _check(q, cache, page_table, lengths)
    sequences, heads, dim = q.shape
    kv_heads, page_size = cache.shape[2:4]
    out = torch.empty(sequences, heads, dim, dtype=q.dtype, device=q.device)
    parts, lse = out, out  # unused by the kernel where nothing is split
    if splits > 1:
        parts = torch.empty(sequences, heads, splits, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(sequences, heads, splits, dtype=torch.float32, device=q.device)
    group, width = heads // kv_heads, max(LEAST, triton.next_power_of_2(dim))
    _decode[(sequences, kv_heads, splits)](
        q,
        cache,
        page_table,
        lengths,
        parts,
        lse,
        q.stride(0),
        *cache.stride()[:4],
        page_table.stride(0),
        dim**-0.5,
        triton.cdiv(triton.cdiv(longest, splits), TILE),
        splits,
        heads=heads,
        group=group,
        rows=max(LEAST, triton.next_power_of_2(group)),
        dim=dim,
        width=width,
        page_size=page_size,
        tile=TILE,
        split=splits > 1,
    )
    if splits > 1:
        _join[(sequences * heads,)](parts, lse, out, splits, count=MAX_SPLITS, dim=dim, width=width)
    return out


def _check(q: Tensor, cache: Tensor, page_table: Tensor, lengths: Tensor) -> None:
    assert q.dim() == 3, q.shape
    assert cache.dim() == 5, cache.shape
    assert cache.shape[0] == 2, cache.shape
    assert cache.shape[4] == q.shape[2], (q.shape, cache.shape)
    assert q.shape[1] % cache.shape[2] == 0, f"{cache.shape[2]} heads of keys do not divide {q.shape[1]}"
    assert q.stride(2) == cache.stride(4) == page_table.stride(1) == lengths.stride(0) == 1, "numbers lie side by side"
    assert q.stride(1) == q.shape[2], "heads lie side by side"
    assert q.dtype == cache.dtype, (q.dtype, cache.dtype)
    assert page_table.dtype == lengths.dtype == torch.int32, (page_table.dtype, lengths.dtype)
    assert len(page_table) == len(lengths) == len(q), (page_table.shape, lengths.shape, q.shape)
    assert q.device == cache.device == page_table.device == lengths.device, "all on one device"


def reference(q: Tensor, cache: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """The same, sequence by sequence, in float32 steps, rounded once."""
    page_size, out = cache.shape[3], torch.empty_like(q)
    for index, length in enumerate(lengths.tolist()):
        pages = page_table[index, : -(-length // page_size)].long()
        k, v = cache[:, pages].transpose(1, 2).flatten(2, 3)[:, :, :length].float()  # [Hkv, L, D]
        one = q[index, :, None].float()
        shared = k.shape[0] != one.shape[0]
        out[index] = F.scaled_dot_product_attention(one[None], k[None], v[None], enable_gqa=shared)[0, :, 0].to(q.dtype)
    return out
