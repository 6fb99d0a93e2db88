"""A norm and what is multiplied with it, in one pass: y [T, D] = x / rms(x) · scale of the token's segment.

Adaptive norms (Peebles and Xie, 2022) with the norm's own weight folded into `scale`. Bytes: x once, y once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multimodal_gen.kernels import native

_rms_norm_scale = native.Function("rms_norm_scale", "ppppiif")


def rms_norm_scale(x: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
    """x / rms(x) · scale[index], in float32, rounded once.

    Args:
        x: [T, D], rows of any stride.
        scale: [S, D] in the dtype of x.
        index: int32 [T]: the row of scale of each token.

    Returns: [T, D].
    """
    _check(x, scale, index)
    if native.by_triton(x):
        from multimodal_gen.kernels.gpu import norm_modulate

        return norm_modulate.rms_norm_scale(x, scale, index, eps)
    compute = _rms_norm_scale.of(x)
    if compute is None:
        return reference(x, scale, index, eps)
    x, scale = x.contiguous(), scale.contiguous()
    y = torch.empty_like(x)
    compute(x.data_ptr(), scale.data_ptr(), index.data_ptr(), y.data_ptr(), *x.shape, eps)
    return y


def _check(x: Tensor, scale: Tensor, index: Tensor) -> None:
    assert x.dim() == scale.dim() == 2, (x.shape, scale.shape)
    assert x.shape[1] == scale.shape[1], (x.shape, scale.shape)
    assert x.dtype == scale.dtype, (x.dtype, scale.dtype)
    assert index.dtype == torch.int32, index.dtype
    assert index.shape == x.shape[:1], (index.shape, x.shape)
    assert index.is_contiguous(), index.stride()
    assert x.device == scale.device == index.device, (x.device, scale.device, index.device)


def reference(x: Tensor, scale: Tensor, index: Tensor, eps: float) -> Tensor:
    """The same in float32 steps, rounded once."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * scale.float()[index]).to(x.dtype)
