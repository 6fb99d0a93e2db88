"""Joining attention over two sets of keys, in place: out = (e^lse · out + e^more_lse · more) / (e^lse + e^more_lse).

What a station of a ring does with every block of keys that comes by (Ring Attention: Liu et al., 2023). Bytes: out
twice, more once, and the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multimodal_gen.kernels import native

_ring_merge = native.Function("ring_merge", "ppppii")


def ring_merge_(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Make `out` and `lse` those of both sets of keys.

    Args:
        out: float32 [T, H, D], overwritten.
        lse: float32 [T, H], natural log-sum-exp of its scores, -inf where no key was seen; overwritten.
        more: [T, H, D] over other keys, of any dtype.
        more_lse: float32 [T, H].
    """
    _check(out, lse, more, more_lse)
    if native.by_triton(out):
        from multimodal_gen.kernels.gpu import ring_merge as gpu

        gpu.ring_merge_(out, lse, more, more_lse)
    elif compute := _ring_merge.of(more):
        more, more_lse = more.contiguous(), more_lse.contiguous()
        pointers = [x.data_ptr() for x in (out, lse, more, more_lse)]
        compute(*pointers, lse.numel(), out.shape[2])
    else:
        joined, total = reference(out, lse, more, more_lse)
        out.copy_(joined)
        lse.copy_(total)


def _check(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    assert out.dim() == 3, out.shape
    assert out.shape == more.shape, (out.shape, more.shape)
    assert lse.shape == more_lse.shape == out.shape[:2], (lse.shape, more_lse.shape, out.shape)
    assert out.dtype == lse.dtype == more_lse.dtype == torch.float32, (out.dtype, lse.dtype, more_lse.dtype)
    assert out.is_contiguous(), out.stride()
    assert lse.is_contiguous(), lse.stride()
    assert out.device == lse.device == more.device == more_lse.device, "all on one device"


def reference(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The same, not in place: [T, H, D] and [T, H]."""
    total = torch.logaddexp(lse, more_lse)
    finite = total.masked_fill(total == -torch.inf, 0.0)
    ours, theirs = ((sums - finite).exp_()[..., None] for sums in (lse, more_lse))
    return out * ours + more.float() * theirs, total
