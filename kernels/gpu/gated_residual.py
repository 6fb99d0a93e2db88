"""`kernels/gated_residual.py` in Triton: a program per token."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multimodal_gen.kernels.gpu.rows import load_shared, normalize, side_by_side, warps_of, width_of
from multimodal_gen.kernels.norm_modulate import Norm


@triton.jit
def _gated_residual(
    x_ptr,
    y_ptr,
    gate_ptr,
    index_ptr,
    scale_ptr,
    shift_ptr,
    norm_index_ptr,
    out_ptr,  # None: no norm follows
    y_row,
    dim,
    eps,  # None: y is taken as it is
    norm_eps,
    layer: tl.constexpr,
    width: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, width)
    inside = column < dim
    added = tl.load(y_ptr + row * y_row + column, mask=inside, other=0.0).to(tl.float32)
    if eps is not None:
        added = normalize(added, inside, dim, eps, False)
    if gate_ptr is not None:
        added *= load_shared(gate_ptr, index_ptr, row, column, inside, dim)
    at = x_ptr + row * dim + column
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32) + added
    stored = total.to(x_ptr.dtype.element_ty)
    tl.store(at, stored, mask=inside)
    if out_ptr is not None:
        normed = normalize(stored.to(tl.float32), inside, dim, norm_eps, layer)
        normed *= load_shared(scale_ptr, norm_index_ptr, row, column, inside, dim)
        if shift_ptr is not None:
            normed += load_shared(shift_ptr, norm_index_ptr, row, column, inside, dim)
        tl.store(out_ptr + row * dim + column, normed.to(out_ptr.dtype.element_ty), mask=inside)


def gated_residual_(
    x: Tensor, y: Tensor, gate: Tensor | None, index: Tensor | None, eps: float | None = None
) -> Tensor:
    """Arguments as checked by `kernels.gated_residual`."""
    _launch(x, y, gate, index, eps, None, None)
    return x


def gated_residual_norm_(
    x: Tensor, y: Tensor, gate: Tensor | None, index: Tensor | None, eps: float | None, norm: Norm
) -> Tensor:
    """Arguments as checked by `kernels.gated_residual`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, y, gate, index, eps, norm, out)
    return out


def _launch(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    index: Tensor | None,
    eps: float | None,
    norm: Norm | None,
    out: Tensor | None,
) -> None:
    tokens, dim = x.shape
    if not tokens:
        return
    y = y if y.stride(1) == 1 else y.contiguous()
    width = width_of(dim)
    _gated_residual[(tokens,)](
        x,
        y,
        side_by_side(gate),
        index,
        None if norm is None else norm.scale.contiguous(),
        None if norm is None else side_by_side(norm.shift),
        None if norm is None else norm.index,
        out,
        y.stride(0),
        dim,
        eps,
        0.0 if norm is None else norm.eps,
        layer=norm is not None and norm.kind == "layer",
        width=width,
        num_warps=warps_of(width),
    )
