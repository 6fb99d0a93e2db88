"""Tokens to 8 bits with a scale each, and sums of such products back, in Triton: for `int8_product` and `fp8_product`.

A program per token, read once. e4m3 is made from the bits of float32 (as torch does it on a CPU), so that it compiles
for GPUs without conversions of their own, and runs in the interpreter.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multimodal_gen.kernels.gpu.rows import warps_of, width_of

PIECE = 1024  # sums of a program


@triton.jit
def _to_e4m3(x):
    """float32 in ± 448 → the bits, uint8, rounded to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    # Below 2⁻⁶ a sum with a large number leaves the bits where they belong.
    small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    usual = (bits - (120 << 23) + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    return (tl.where(bits < (121 << 23), small, usual) | sign).to(tl.uint8)


@triton.jit
def _quantize_rows(
    x_ptr,
    numbers_ptr,
    scales_ptr,
    columns,
    x_row,
    largest: tl.constexpr,
    whole: tl.constexpr,  # numbers are whole, int8; else e4m3
    width: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, width)
    inside = column < columns
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    known = x == x  # NaN is not lost: the scale is infinite
    top = tl.max(tl.where(known, tl.abs(x), float("inf")), 0)
    scale = top * (1.0 / largest)
    x = tl.minimum(tl.maximum(x * (1.0 / tl.where(scale > 0, scale, 1.0)), -largest), largest)
    # 1.5 · 2²³ added and taken away: to nearest, ties to even.
    numbers = ((x + 12582912.0) - 12582912.0).to(tl.int8) if whole else _to_e4m3(x)
    tl.store(numbers_ptr + row * columns + column, numbers, mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def _finish(sums_ptr, tokens_ptr, outputs_ptr, bias_ptr, y_ptr, columns, piece: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * piece + tl.arange(0, piece)
    inside = column < columns
    at = row * columns + column
    scale = tl.load(outputs_ptr + column, mask=inside, other=0.0) * tl.load(tokens_ptr + row)
    y = tl.load(sums_ptr + at, mask=inside, other=0).to(tl.float32) * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def quantize_rows(x: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """x [T, in] → int8 or e4m3 [T, in], scales float32 [T]; a token that is not finite has an infinite scale."""
    x = x if x.stride(1) == 1 else x.contiguous()
    numbers = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    rows, columns = x.shape
    if x.numel():
        whole, width = dtype == torch.int8, width_of(columns)
        target = numbers if whole else numbers.view(torch.uint8)
        _quantize_rows[(rows,)](
            x, target, scales, columns, x.stride(0), largest=largest, whole=whole, width=width,
            num_warps=warps_of(width),
        )  # fmt: skip
    return numbers, scales


def finish(sums: Tensor, tokens: Tensor, outputs: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Arguments as checked by `kernels.int8_product.finish`."""
    rows, columns = sums.shape
    if y.numel():
        _finish[(rows, triton.cdiv(columns, PIECE))](sums, tokens, outputs, bias, y, columns, piece=PIECE)
    return y
