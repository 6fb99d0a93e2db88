"""`kernels/packed_attention.py` in Triton: a program per tile of queries and head (FlashAttention-2: Dao, 2023).

Which rows a program has stands in a table that is made once per shape of a batch, so launches of all layers and steps
copy nothing to the device, and its address stays.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

COLUMNS = 6  # of the table: rows of q from, to; rows of k from, to; how often the last counts; keys that the first sees
LEAST = 16  # what tl.dot wants of each side


class Blocks(NamedTuple):
    """How a program is cut."""

    rows: int  # queries of a tile
    keys: int  # of a step
    warps: int
    stages: int  # steps whose keys and values are under way


MOST = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}  # D: beyond, registers would be spilled


def blocks_for(dtype: torch.dtype, dim: int, hopper: bool) -> Blocks:
    """The fastest that spill nothing (compiled.md), of thirteen tried on an H100.

    `hopper`: sm_90 or sm_100, whose blocks have more shared memory.
    """
    assert dim <= MOST[dtype], f"heads of {dim} numbers of {dtype}; at most {MOST[dtype]}"
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 2) if dim <= 64 else Blocks(16, 32, 4, 2)
    if dim <= 64:
        return Blocks(64, 64, 4, 3) if hopper else Blocks(128, 64, 4, 3)
    if dim <= 128:
        return Blocks(128, 64, 8, 3) if hopper else Blocks(64, 64, 4, 3)
    return Blocks(64, 32, 8, 2)


def _hopper() -> bool:
    return not knobs.runtime.interpret and 90 <= driver.active.get_current_target().arch < 120


@triton.jit
def _step(
    q,
    mixed,
    top,
    total,
    k_ptr,  # of this step's first key
    v_ptr,
    k_token,
    v_token,
    here,  # keys from this step's first to the last one
    visible,  # of them, what each row sees [rows]
    bias,  # of the last key
    scale,
    column,
    dim: tl.constexpr,
    keys: tl.constexpr,
    masked: tl.constexpr,
):
    key, inside = tl.arange(0, keys), column < dim
    k_at = k_ptr + (key[None, :] * k_token + column[:, None])
    v_at = v_ptr + (key[:, None] * v_token + column[None, :])
    if masked:
        k = tl.load(k_at, mask=inside[:, None] & (key < here)[None, :], other=0.0)
        v = tl.load(v_at, mask=(key < here)[:, None] & inside[None, :], other=0.0)
    else:
        k = tl.load(k_at, mask=inside[:, None], other=0.0)
        v = tl.load(v_at, mask=inside[None, :], other=0.0)
    scores = tl.dot(q, k, input_precision="tf32x3") * scale
    if masked:
        scores += tl.where(key == here - 1, bias, 0.0)[None, :]
        scores = tl.where((key[None, :] < visible[:, None]) & (key < here)[None, :], scores, float("-inf"))
    now = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - now[:, None])
    shrink = tl.exp2(top - now)
    mixed = mixed * shrink[:, None]
    mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision="tf32x3")
    return mixed, now, total * shrink + tl.sum(weights, 1)


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    table_ptr,
    q_token,  # strides, in numbers
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    scale,  # times log2(e)
    heads,
    group,  # heads that share keys
    dim: tl.constexpr,
    width: tl.constexpr,  # at least `dim`
    rows: tl.constexpr,
    keys: tl.constexpr,
    causal: tl.constexpr,
    with_lse: tl.constexpr,
):
    """Program (tile, head)."""
    at, head = table_ptr + tl.program_id(0) * 6, tl.program_id(1)
    first, stop = tl.load(at), tl.load(at + 1)
    key, key_stop = tl.load(at + 2), tl.load(at + 3)
    bias, sees = tl.log2(tl.load(at + 4).to(tl.float32)), tl.load(at + 5)

    row, column = first + tl.arange(0, rows), tl.arange(0, width)
    own = (row < stop)[:, None] & (column < dim)[None, :]
    row = row.to(tl.int64)
    q = tl.load(q_ptr + row[:, None] * q_token + head * q_head + column[None, :], mask=own, other=0.0)

    length = key_stop - key
    whole = length - 1  # keys that all rows see, the last one apart, which may count several times
    until = length
    if causal:
        whole = tl.minimum(whole, sees)
        until = tl.minimum(length, sees + rows - 1)
    whole = whole // keys * keys
    k_ptr += head // group * k_head + key.to(tl.int64) * k_token
    v_ptr += head // group * v_head + key.to(tl.int64) * v_token

    top = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    mixed = tl.zeros((rows, width), tl.float32)
    visible = tl.full((rows,), 0, tl.int32) + length
    if causal:
        visible = sees + tl.arange(0, rows)
    for _ in range(0, whole, keys):
        mixed, top, total = _step(
            q,
            mixed,
            top,
            total,
            k_ptr,
            v_ptr,
            k_token,
            v_token,
            length,
            visible,
            bias,
            scale,
            column,
            dim,
            keys,
            False,
        )
        k_ptr += keys * k_token
        v_ptr += keys * v_token
    for start in range(whole, until, keys):
        mixed, top, total = _step(
            q,
            mixed,
            top,
            total,
            k_ptr,
            v_ptr,
            k_token,
            v_token,
            length - start,
            visible - start,
            bias,
            scale,
            column,
            dim,
            keys,
            True,
        )
        k_ptr += keys * k_token
        v_ptr += keys * v_token

    found = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * out_token + head * out_head + column[None, :], found, mask=own)
    if with_lse:
        tl.store(lse_ptr + row * heads + head, (top + tl.log2(total)) * 0.6931471805599453, mask=row < stop)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    counts: Sequence[int],
    causal: bool,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Arguments as checked by `kernels.packed_attention`; fills `out` and `lse` [T, H] where there are keys."""
    heads, dim = q.shape[1:]
    blocks = blocks_for(q.dtype, dim, _hopper())
    table = _table(tuple(lengths), tuple(key_lengths), tuple(counts), blocks.rows, q.device)
    if not len(table):
        return
    _attend[(len(table), heads)](
        q,
        k,
        v,
        out,
        out if lse is None else lse,  # not written to where there is none
        table,
        *(stride for x in (q, k, v, out) for stride in x.stride()[:2]),
        dim**-0.5 * math.log2(math.e),
        heads,
        heads // k.shape[1],
        dim=dim,
        width=max(LEAST, triton.next_power_of_2(dim)),
        rows=blocks.rows,
        keys=blocks.keys,
        causal=causal,
        with_lse=lse is not None,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


@functools.lru_cache(maxsize=64)
def _table(
    lengths: tuple[int, ...], key_lengths: tuple[int, ...], counts: tuple[int, ...], rows: int, device: torch.device
) -> Tensor:
    """int32 [tiles, 6], see `COLUMNS`. Long segments first: the last programs to start should be short ones."""
    tiles, query, key = [], 0, 0
    for length, key_length, count in zip(lengths, key_lengths, counts, strict=True):
        for start in range(0, length if key_length else 0, rows):
            sees = key_length - length + start + 1
            tiles.append((query + start, query + length, key, key + key_length, count, sees))
        query, key = query + length, key + key_length
    tiles.sort(key=lambda tile: tile[2] - tile[3])
    return torch.tensor(tiles, dtype=torch.int32, device=device).view(-1, COLUMNS)
