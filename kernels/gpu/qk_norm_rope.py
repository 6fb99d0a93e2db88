"""`kernels/qk_norm_rope.py` in Triton: a program per token and part, with all heads of it."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from multimodal_gen.kernels.gpu.rows import side_by_side, warps_of, width_of


@triton.jit
def _pairs(at, mask, rows: tl.constexpr, half: tl.constexpr, halves: tl.constexpr):
    """What is turned together: float32 [rows, half] twice, from pointers and mask [rows, 2 · half]."""
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if halves:
        return tl.split(tl.permute(tl.reshape(x, (rows, 2, half)), (0, 2, 1)))
    return tl.split(tl.reshape(x, (rows, half, 2)))


@triton.jit
def _qk_norm_rope(
    x_ptr,
    weight_ptr,
    turns_ptr,  # None: nothing is turned
    mean_square_ptr,  # None: made here
    token_stride,
    parts,  # those that are normalised
    heads,
    eps,
    dim: tl.constexpr,
    across: tl.constexpr,  # norms over all heads
    halves: tl.constexpr,
    rows: tl.constexpr,  # at least `heads`
    half: tl.constexpr,  # at least dim / 2
):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, place = tl.arange(0, rows), tl.arange(0, 2 * half)
    # Where numbers are padded to powers of two, each half is padded by itself.
    second = (place >= half).to(tl.int32) if halves else place * 0
    within = place - second * half
    column = within + second * (dim // 2)
    here = within < (dim // 2 if halves else dim)
    mask = (head < heads)[:, None] & here[None, :]
    at = x_ptr + token * token_stride + part * heads * dim + head[:, None] * dim + column[None, :]
    a, b = _pairs(at, mask, rows, half, halves)

    if across:
        if mean_square_ptr is not None:
            square = tl.load(mean_square_ptr + token * parts + part)
        else:
            square = tl.sum(tl.sum(a * a + b * b, 1), 0) / (heads * dim)
        inverse = tl.rsqrt(square + eps)
        weights = weight_ptr + part * heads * dim + head[:, None] * dim + column[None, :]
        weight_a, weight_b = _pairs(weights, mask, rows, half, halves)
    else:
        inverse = tl.rsqrt(tl.sum(a * a + b * b, 1) / dim + eps)[:, None]
        weights = weight_ptr + part * dim + head[:, None] * 0 + column[None, :]
        weight_a, weight_b = _pairs(weights, mask, rows, half, halves)
    a, b = a * inverse * weight_a, b * inverse * weight_b

    if turns_ptr is not None:
        angle = tl.arange(0, half)
        turns = turns_ptr + token * dim + angle
        cos = tl.load(turns, mask=angle < dim // 2, other=0.0)[None, :]
        sin = tl.load(turns + dim // 2, mask=angle < dim // 2, other=0.0)[None, :]
        a, b = a * cos - b * sin, b * cos + a * sin
    y = tl.join(a, b)
    if halves:
        y = tl.permute(y, (0, 2, 1))
    tl.store(at, tl.reshape(y, (rows, 2 * half)).to(x_ptr.dtype.element_ty), mask=mask)


def qk_norm_rope_(
    x: Tensor,
    weight: Tensor,
    turns: Tensor | None,
    eps: float,
    *,
    pairs: Literal["neighbours", "halves"] = "neighbours",
    mean_square: Tensor | None = None,
) -> Tensor:
    """Arguments as checked by `kernels.qk_norm_rope`."""
    tokens, _, heads, dim = x.shape
    if not tokens:
        return x
    rows, half = width_of(heads), width_of(max(dim // 2, 1))
    _qk_norm_rope[(tokens, len(weight))](
        x,
        weight.contiguous(),
        side_by_side(turns),
        side_by_side(mean_square),
        x.stride(0),
        len(weight),
        heads,
        eps,
        dim=dim,
        across=mean_square is not None or weight.shape[1] != dim,
        halves=pairs == "halves",
        rows=rows,
        half=half,
        num_warps=warps_of(rows * 2 * half),
    )
    return x
