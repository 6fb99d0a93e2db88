"""`kernels/norm_modulate.py` in Triton: a program per token."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multimodal_gen.kernels.gpu.rows import load_shared, normalize, side_by_side, warps_of, width_of


@triton.jit
def _norm_modulate(
    x_ptr, scale_ptr, shift_ptr, index_ptr, y_ptr, x_row, dim, eps, layer: tl.constexpr, width: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, width)
    inside = column < dim
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    y = normalize(x, inside, dim, eps, layer) * load_shared(scale_ptr, index_ptr, row, column, inside, dim)
    if shift_ptr is not None:
        y += load_shared(shift_ptr, index_ptr, row, column, inside, dim)
    tl.store(y_ptr + row * dim + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm_scale(x: Tensor, scale: Tensor, index: Tensor | None, eps: float) -> Tensor:
    """Arguments as checked by `kernels.norm_modulate`."""
    return _launch(x, scale, None, index, eps, layer=False)


def layer_norm_scale_shift(x: Tensor, scale: Tensor, shift: Tensor | None, index: Tensor | None, eps: float) -> Tensor:
    """Arguments as checked by `kernels.norm_modulate`."""
    return _launch(x, scale, shift, index, eps, layer=True)


def _launch(x: Tensor, scale: Tensor, shift: Tensor | None, index: Tensor | None, eps: float, *, layer: bool) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, dim = x.shape
    width = width_of(dim)
    if tokens:
        rows = side_by_side(scale), side_by_side(shift)
        _norm_modulate[(tokens,)](
            x, *rows, index, y, x.stride(0), dim, eps, layer=layer, width=width, num_warps=warps_of(width)
        )
    return y
