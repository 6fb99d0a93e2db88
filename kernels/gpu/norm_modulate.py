"""`kernels/norm_modulate.py` in Triton: a program per token."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_scale(x_ptr, scale_ptr, index_ptr, y_ptr, x_row, dim, eps, width: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, width)
    inside = column < dim
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    segment = tl.load(index_ptr + row).to(tl.int64)
    scale = tl.load(scale_ptr + segment * dim + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / dim + eps)
    tl.store(y_ptr + row * dim + column, (x * inverse * scale).to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm_scale(x: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
    """Arguments as checked by `kernels.norm_modulate`."""
    assert x.stride(1) == 1, x.stride()
    scale = scale.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, dim = x.shape
    if tokens:
        width = triton.next_power_of_2(dim)
        _rms_norm_scale[(tokens,)](x, scale, index, y, x.stride(0), dim, eps, width=width)
    return y
