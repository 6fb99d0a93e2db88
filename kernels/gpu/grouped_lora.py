"""`kernels/grouped_lora.py` in Triton: two kernels, to the hidden numbers and back, a token's share at a time."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RANKS = 16  # of a program
INPUTS = 128  # that are summed at a time
OUTPUTS = 256  # of a program


@triton.jit
def _shrink(
    x_ptr,
    down_ptr,
    starts_ptr,
    owners_ptr,
    hidden_ptr,
    inputs,
    total,  # ΣR
    widest,  # ranks of the widest group: a row of `hidden`
    x_row,
    ranks: tl.constexpr,
    step: tl.constexpr,
):
    """Program (token, piece of its group's ranks)."""
    token = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners_ptr + token)
    if owner >= 0:
        start = tl.load(starts_ptr + owner)
        count = tl.load(starts_ptr + owner + 1) - start
        rank = tl.program_id(1) * ranks + tl.arange(0, ranks)
        total_sum = tl.zeros((ranks,), tl.float32)
        for begin in range(0, inputs, step):
            k = begin + tl.arange(0, step)
            x = tl.load(x_ptr + token * x_row + k, mask=k < inputs, other=0.0).to(tl.float32)
            inside = (k < inputs)[:, None] & (rank < count)[None, :]
            at = down_ptr + k[:, None].to(tl.int64) * total + start + rank[None, :]
            total_sum += tl.sum(x[:, None] * tl.load(at, mask=inside, other=0.0).to(tl.float32), 0)
        tl.store(hidden_ptr + token * widest + rank, total_sum, mask=rank < count)


@triton.jit
def _expand(
    y_ptr,
    hidden_ptr,
    up_ptr,
    starts_ptr,
    owners_ptr,
    outputs,
    widest,
    y_row,
    ranks: tl.constexpr,
    piece: tl.constexpr,
):
    """Program (token, piece of the outputs)."""
    token = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners_ptr + token)
    if owner >= 0:
        start = tl.load(starts_ptr + owner)
        count = tl.load(starts_ptr + owner + 1) - start
        column = tl.program_id(1) * piece + tl.arange(0, piece)
        at = y_ptr + token * y_row + column
        y = tl.load(at, mask=column < outputs, other=0.0).to(tl.float32)
        for begin in range(0, count, ranks):
            rank = begin + tl.arange(0, ranks)
            hidden = tl.load(hidden_ptr + token * widest + rank, mask=rank < count, other=0.0)
            inside = (rank < count)[:, None] & (column < outputs)[None, :]
            rows = up_ptr + (start + rank)[:, None].to(tl.int64) * outputs + column[None, :]
            y += tl.sum(hidden[:, None] * tl.load(rows, mask=inside, other=0.0).to(tl.float32), 0)
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=column < outputs)


def grouped_lora_(y: Tensor, x: Tensor, down: Tensor, up: Tensor, starts: Tensor, owners: Tensor) -> Tensor:
    """Arguments as checked by `kernels.grouped_lora`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    assert y.stride(1) == 1, y.stride()
    # How wide the widest group is, only the device knows: all ranks together are a bound that needs no waiting for it.
    (tokens, outputs), total = y.shape, up.shape[0]
    if not (tokens and total):
        return y
    hidden = torch.empty(tokens, total, dtype=torch.float32, device=x.device)
    _shrink[(tokens, triton.cdiv(total, RANKS))](
        *(x, down, starts, owners, hidden, x.shape[1], total, total, x.stride(0)), ranks=RANKS, step=INPUTS
    )
    _expand[(tokens, triton.cdiv(outputs, OUTPUTS))](
        *(y, hidden, up, starts, owners, outputs, total, y.stride(0)), ranks=RANKS, piece=OUTPUTS
    )
    return y
