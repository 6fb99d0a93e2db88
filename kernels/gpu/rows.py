"""What kernels that work row by row have in common: how wide a program is, and the norm of a row."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

EACH = 16  # numbers of a row that a thread holds: two loads of 16 bytes in half precision
MAX_WARPS = 16
PROCESSORS_ELSEWHERE = 16  # in the interpreter, and where kernels are compiled for a GPU that is not there


def width_of(dim: int) -> int:
    """Numbers that a program works on for a row of `dim`."""
    return triton.next_power_of_2(dim)


def warps_of(numbers: int) -> int:
    """Warps of a program that holds so many numbers."""
    return max(1, min(MAX_WARPS, numbers // (32 * EACH)))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors."""
    if device.type != "cuda":
        return PROCESSORS_ELSEWHERE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def side_by_side(rows: Tensor | None) -> Tensor | None:
    """The few rows that tokens share, contiguous."""
    return None if rows is None else rows.contiguous()


@triton.jit
def load_shared(rows_ptr, index_ptr, row, column, inside, dim):
    """Of the rows [S, dim], float32, the one that the token `row` has; the first where there is no index."""
    at = rows_ptr + column
    if index_ptr is not None:
        at += tl.load(index_ptr + row).to(tl.int64) * dim
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def normalize(x, inside, dim, eps, layer: tl.constexpr):
    """One row, float32 with zeros where not `inside`, over its root mean square, or as a layer norm."""
    if layer:
        x = tl.where(inside, x - tl.sum(x, 0) / dim, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / dim + eps)
