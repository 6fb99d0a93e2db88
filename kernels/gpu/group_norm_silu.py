"""`kernels/group_norm_silu.py` in Triton: sums of blocks of pixels, then the norm. x is read twice, y written once."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multimodal_gen.kernels.gpu.rows import warps_of, width_of

NUMBERS = 4096  # in hand of a program
BLOCKS = 32  # of pixels that one program sums up, one after another


@triton.jit
def _moments(x_ptr, sums_ptr, pixels, channels, blocks, rows: tl.constexpr, width: tl.constexpr):
    # Of each channel, around its first number: what is subtracted later stays small (Chan et al., 1983).
    program, column = tl.program_id(0).to(tl.int64), tl.arange(0, width)
    there = column < channels
    pivot = tl.load(x_ptr + column, mask=there, other=0.0).to(tl.float32)
    # Summed over the rows at the end: threads wait for one another once, not at every block.
    total, square = tl.zeros([rows, width], tl.float32), tl.zeros([rows, width], tl.float32)
    for block in range(blocks):
        row = (program * blocks + block) * rows + tl.arange(0, rows)
        inside = (row < pixels)[:, None] & there[None, :]
        x = tl.load(x_ptr + row[:, None] * channels + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - pivot[None, :], 0.0)
        total += x
        square += x * x
    tl.store(sums_ptr + 2 * program * channels + column, tl.sum(total, 0), mask=there)
    tl.store(sums_ptr + (2 * program + 1) * channels + column, tl.sum(square, 0), mask=there)


@triton.jit
def _apply(x_ptr, factors_ptr, y_ptr, pixels, channels, rows: tl.constexpr, width: tl.constexpr, silu: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, width)
    there = column < channels
    inside = (row < pixels)[:, None] & there[None, :]
    by = tl.load(factors_ptr + column, mask=there, other=0.0)
    add = tl.load(factors_ptr + channels + column, mask=there, other=0.0)
    at = row[:, None] * channels + column[None, :]
    y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * by[None, :] + add[None, :]
    if silu:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, out: Tensor
) -> Tensor:
    """Arguments as checked by `kernels.group_norm_silu`."""
    channels = x.shape[-1]
    pixels, width = x.numel() // channels, width_of(channels)
    rows = max(1, NUMBERS // width)
    warps, programs = warps_of(rows * width), triton.cdiv(pixels, rows * BLOCKS)
    sums = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
    _moments[(programs,)](x, sums, pixels, channels, BLOCKS, rows=rows, width=width, num_warps=warps)
    factors = _factors(sums, x.view(pixels, channels)[0], weight, bias, groups, pixels, eps)
    grid = (triton.cdiv(pixels, rows),)
    _apply[grid](x, factors, out, pixels, channels, rows=rows, width=width, silu=silu, num_warps=warps)
    return out


def _factors(sums: Tensor, pivot: Tensor, weight: Tensor, bias: Tensor, groups: int, pixels: int, eps: float) -> Tensor:
    """What every channel is multiplied with, and what is added: float32 [2, C]. A few numbers, in float64."""
    total, square = sums.double().sum(0)
    means = total / pixels  # of channels, less their pivots
    spread = (square / pixels - means * means).view(groups, -1)
    means = (means + pivot.double()).view(groups, -1)
    mean = means.mean(1, keepdim=True)
    variance = (spread + (means - mean).square()).mean(1, keepdim=True).clamp_min(0)
    by = ((variance + eps).rsqrt() * weight.double().view(groups, -1)).flatten()
    return torch.stack([by, bias.double() - mean.expand_as(means).flatten() * by]).float()
