"""`kernels/rms_norm_silu.py` in Triton: a program per block of pixels, each read once."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from multimodal_gen.kernels.gpu.rows import warps_of, width_of

NUMBERS = 4096  # in hand of a program


@triton.jit
def _rms_norm_silu(
    x_ptr, weight_ptr, y_ptr, pixels, channels, root, rows: tl.constexpr, width: tl.constexpr, silu: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, width)
    inside = (row < pixels)[:, None] & (column < channels)[None, :]
    at = row[:, None] * channels + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < channels, other=0.0).to(tl.float32) * root
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
    y = x / length[:, None] * weight[None, :]
    if silu:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm_silu(x: Tensor, weight: Tensor, silu: bool, out: Tensor) -> Tensor:
    """Arguments as checked by `kernels.rms_norm_silu`."""
    channels = x.shape[-1]
    pixels = x.numel() // channels
    if pixels:
        width = width_of(channels)
        rows = max(1, NUMBERS // width)
        _rms_norm_silu[(triton.cdiv(pixels, rows),)](
            x, weight.contiguous(), out, pixels, channels, channels**0.5, rows=rows, width=width, silu=silu,
            num_warps=warps_of(rows * width),
        )  # fmt: skip
    return out
