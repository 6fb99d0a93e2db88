"""GroupNorm and the SiLU after it over a picture in channels-last order: silu(group_norm(x) · weight + bias).

Statistics are over all pixels and the channels of a group (Wu and He, 2018). Bytes: x twice, y once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels import native

SLICE = 4096  # pixels summed by one thread; the result does not depend on how many threads there are
SLICES = 64  # at most

_group_norm_silu = native.Function("group_norm_silu", "ppppppiiiifi")


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """The norm in float32, rounded once.

    Args:
        x: [H, W, C], contiguous: one picture.
        weight, bias: [C].
        silu: False: the norm alone.
        out: where the result goes, contiguous; may be x itself.

    Returns: [H, W, C].
    """
    _check(x, weight, bias, groups, out)
    out = torch.empty_like(x) if out is None else out
    if native.by_triton(x):
        from multimodal_gen.kernels.gpu import group_norm_silu as gpu

        return gpu.group_norm_silu(x, weight, bias, groups, eps, silu, out)
    compute = _group_norm_silu.of(x)
    if compute is None:
        return out.copy_(reference(x, weight, bias, groups, eps, silu=silu))
    pixels, channels = x.shape[0] * x.shape[1], x.shape[2]
    slices = min(SLICES, -(-pixels // SLICE))
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    factors = torch.empty(3 * channels, dtype=torch.float32, device=x.device)
    room = torch.empty(slices * 2 * channels, dtype=torch.float64, device=x.device)
    compute(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), factors.data_ptr(), room.data_ptr(),
        pixels, channels, groups, slices, eps, silu,
    )  # fmt: skip
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, out: Tensor | None) -> None:
    assert x.dim() == 3, x.shape
    assert x.numel(), "a picture has pixels"
    assert x.is_contiguous(), x.stride()
    assert weight.shape == bias.shape == x.shape[-1:], (weight.shape, bias.shape, x.shape)
    assert x.shape[-1] % groups == 0, (x.shape, groups)
    assert x.dtype == weight.dtype == bias.dtype, (x.dtype, weight.dtype, bias.dtype)
    assert x.device == weight.device == bias.device, (x.device, weight.device, bias.device)
    if out is not None:
        assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device), (out.shape, x.shape)
        assert out.is_contiguous(), out.stride()


def reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool = True) -> Tensor:
    """The same in float32 steps, rounded once."""
    pixels = x.float().permute(2, 0, 1)[None]
    y = F.group_norm(pixels, groups, weight.float(), bias.float(), eps)[0].permute(1, 2, 0)
    return (F.silu(y) if silu else y).to(x.dtype).contiguous()
