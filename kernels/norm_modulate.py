"""A norm and what is done to its result, in one pass: y [T, D] = norm(x) · scale + shift of the token's segment.

Adaptive norms (Peebles and Xie, 2022) with the norm's own weight folded into `scale`. RMS norms (Zhang and Sennrich,
2019) and layer norms (Ba et al., 2016). Bytes: x once, y once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels import native

_rms_norm_scale = native.Function("rms_norm_scale", "pppipiif")
_layer_norm = native.Function("layer_norm_scale_shift", "ppppipiif")


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over D that tokens go through, with scale and shift of each token's segment."""

    kind: Literal["rms", "layer"]
    scale: Tensor  # [S, D], in the dtype of the tokens or float32
    shift: Tensor | None  # as scale; of layer norms
    index: Tensor | None  # int32 [T]: the row of scale and shift of each token; None: the first row
    eps: float


def norm_modulate(x: Tensor, norm: Norm) -> Tensor:
    """x [T, D] → [T, D], through the function of the norm's kind."""
    if norm.kind == "layer":
        return layer_norm_scale_shift(x, norm.scale, norm.shift, norm.index, norm.eps)
    assert norm.shift is None, "RMS norms have no shift"
    return rms_norm_scale(x, norm.scale, norm.index, norm.eps)


def rms_norm_scale(x: Tensor, scale: Tensor, index: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) · scale[index], in float32, rounded once.

    Args:
        x: [T, D], rows of any stride.
        scale: [S, D] in the dtype of x or float32.
        index: int32 [T]: the row of scale of each token; None: the first row.

    Returns: [T, D].
    """
    check_rows(x, scale, index)
    if native.by_triton(x):
        from multimodal_gen.kernels.gpu import norm_modulate

        return norm_modulate.rms_norm_scale(x, scale, index, eps)
    compute = _rms_norm_scale.of(x)
    if compute is None:
        return rms_norm_scale_reference(x, scale, index, eps)
    x, scale = x.contiguous(), scale.contiguous()
    y = torch.empty_like(x)
    wide = scale.dtype != x.dtype
    compute(x.data_ptr(), scale.data_ptr(), address(index), wide, y.data_ptr(), *x.shape, eps)
    return y


def layer_norm_scale_shift(x: Tensor, scale: Tensor, shift: Tensor | None, index: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / std · scale[index] + shift[index], in float32, rounded once.

    Args:
        x: [T, D], rows of any stride.
        scale: [S, D] in the dtype of x or float32.
        shift: as scale; None: zeros.
        index: int32 [T]: the row of scale and shift of each token; None: the first row.

    Returns: [T, D].
    """
    check_rows(x, scale, index)
    check_alike(scale, shift)
    if native.by_triton(x):
        from multimodal_gen.kernels.gpu import norm_modulate

        return norm_modulate.layer_norm_scale_shift(x, scale, shift, index, eps)
    compute = _layer_norm.of(x)
    if compute is None:
        return layer_norm_scale_shift_reference(x, scale, shift, index, eps)
    x, scale, shift = x.contiguous(), scale.contiguous(), None if shift is None else shift.contiguous()
    y = torch.empty_like(x)
    wide = scale.dtype != x.dtype
    rows = scale.data_ptr(), address(shift), address(index)
    compute(x.data_ptr(), *rows, wide, y.data_ptr(), *x.shape, eps)
    return y


def address(x: Tensor | None) -> int | None:
    """Where a tensor's numbers lie; None becomes a null pointer."""
    return None if x is None else x.data_ptr()


def check_rows(x: Tensor, rows: Tensor, index: Tensor | None) -> None:
    """`rows` [S, D] fit x [T, D], and `index` says which token has which."""
    assert x.dim() == rows.dim() == 2, (x.shape, rows.shape)
    assert x.shape[1] == rows.shape[1], (x.shape, rows.shape)
    assert rows.dtype in (x.dtype, torch.float32), (x.dtype, rows.dtype)
    assert x.device == rows.device, (x.device, rows.device)
    if index is not None:
        assert index.dtype == torch.int32, index.dtype
        assert index.shape == x.shape[:1], (index.shape, x.shape)
        assert index.is_contiguous(), index.stride()
        assert index.device == x.device, (index.device, x.device)


def check_alike(scale: Tensor, shift: Tensor | None) -> None:
    """A shift looks like its scale."""
    if shift is not None:
        assert shift.shape == scale.shape, (shift.shape, scale.shape)
        assert shift.dtype == scale.dtype, (shift.dtype, scale.dtype)
        assert shift.device == scale.device, (shift.device, scale.device)


def of_tokens(rows: Tensor, index: Tensor | None) -> Tensor:
    """rows [S, D] → [T, D], or [1, D] where all tokens have the first."""
    return rows[:1] if index is None else rows[index]


def over_rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x), float32. torch's own RMS norm makes seven passes over x on a CPU; this makes two."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def norm_modulate_reference(x: Tensor, norm: Norm) -> Tensor:
    """The same in float32 steps, rounded once."""
    if norm.kind == "layer":
        return layer_norm_scale_shift_reference(x, norm.scale, norm.shift, norm.index, norm.eps)
    return rms_norm_scale_reference(x, norm.scale, norm.index, norm.eps)


def rms_norm_scale_reference(x: Tensor, scale: Tensor, index: Tensor | None, eps: float) -> Tensor:
    """The same in float32 steps, rounded once."""
    return over_rms(x, eps).mul_(of_tokens(scale, index)).to(x.dtype)


def layer_norm_scale_shift_reference(
    x: Tensor, scale: Tensor, shift: Tensor | None, index: Tensor | None, eps: float
) -> Tensor:
    """The same in float32 steps, rounded once."""
    y = F.layer_norm(x.float(), x.shape[-1:], None, None, eps).mul_(of_tokens(scale, index))
    return (y if shift is None else y.add_(of_tokens(shift, index))).to(x.dtype)
