"""`kernels/timestep_embedding.py` in Triton: a program per timestep."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from multimodal_gen.kernels.gpu.rows import width_of


@triton.jit
def _timestep_embedding(values_ptr, y_ptr, half, log_period: tl.constexpr, width: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, width)
    inside = column < half
    # In float64: an angle of 1000 in float32 is off by 3e-5 already.
    angle = tl.load(values_ptr + row).to(tl.float64) * tl.exp(-log_period * column.to(tl.float64) / half)
    turns = angle * 0.15915494309189535  # 1 / (2 π)
    rest = (turns - tl.floor(turns + 0.5)) * 6.283185307179586
    # Taylor series: π²⁵ / 25! is 2e-13. The library's functions keep an array for angles without bounds.
    square, cosine, sine = rest * rest, rest * 0 + 1, rest * 0 + 1
    for k in tl.static_range(12, 0, -1):
        cosine = 1 - cosine * square / (2 * k * (2 * k - 1))
        sine = 1 - sine * square / (2 * k * (2 * k + 1))
    tl.store(y_ptr + row * 2 * half + column, cosine.to(tl.float32), mask=inside)
    tl.store(y_ptr + row * 2 * half + half + column, (sine * rest).to(tl.float32), mask=inside)


def timestep_embedding(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Arguments as checked by `kernels.timestep_embedding`."""
    y = torch.empty(len(values), dim, dtype=torch.float32, device=values.device)
    if y.numel():
        half = dim // 2
        _timestep_embedding[(len(values),)](
            values.contiguous(), y, half, log_period=math.log(max_period), width=width_of(half)
        )
    return y
