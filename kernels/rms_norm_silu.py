"""The norm of Wan's VAE and the SiLU after it, in one pass: silu(x / ‖x‖ · √C · weight) over the channels of a pixel.

Pixels are [..., C], channels last. Reference: diffusers' WanRMS_norm, which divides by 1e-12 at least. Bytes: x once, y
once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels import native

LEAST = 1e-12  # that is divided by

_rms_norm_silu = native.Function("rms_norm_silu", "pppiifi")


def rms_norm_silu(x: Tensor, weight: Tensor, *, silu: bool = True, out: Tensor | None = None) -> Tensor:
    """The norm in float32, rounded once.

    Args:
        x: [..., C], contiguous.
        weight: [C].
        silu: False: the norm alone.
        out: where the result goes, contiguous; may be x itself.

    Returns: [..., C].
    """
    _check(x, weight, out)
    out = torch.empty_like(x) if out is None else out
    if native.by_triton(x):
        from multimodal_gen.kernels.gpu import rms_norm_silu as gpu

        return gpu.rms_norm_silu(x, weight, silu, out)
    compute = _rms_norm_silu.of(x)
    if compute is None:
        return out.copy_(reference(x, weight, silu=silu))
    channels = x.shape[-1]
    scale = weight.float() * channels**0.5
    compute(x.data_ptr(), scale.data_ptr(), out.data_ptr(), x.numel() // channels, channels, LEAST, silu)
    return out


def _check(x: Tensor, weight: Tensor, out: Tensor | None) -> None:
    assert x.is_contiguous(), x.stride()
    assert weight.shape == x.shape[-1:], (weight.shape, x.shape)
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    assert x.device == weight.device, (x.device, weight.device)
    if out is not None:
        assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device), (out.shape, x.shape)
        assert out.is_contiguous(), out.stride()


def reference(x: Tensor, weight: Tensor, *, silu: bool = True) -> Tensor:
    """The same in float32 steps, rounded once."""
    y = F.normalize(x.float(), dim=-1, eps=LEAST) * (x.shape[-1] ** 0.5 * weight.float())
    return (F.silu(y) if silu else y).to(x.dtype)
