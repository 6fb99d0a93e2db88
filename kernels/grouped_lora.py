"""y [T, out] += x [T, in] · A · B with low-rank factors of each token's own (BGMV of Punica: Chen et al., 2023).

Factors stand side by side: A of all groups is one [in, ΣR], B one [ΣR, out], and `starts` says where a group begins. A
token computes with the ranks of its group alone, so what other groups' factors hold (overflows too) does not matter.
For few tokens: a run of many tokens of one group is better multiplied as one matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multimodal_gen.kernels.native import Function, by_triton

MOST_RANKS = 1024  # of all groups, in C++

_native = Function("grouped_lora", "ppppppiiiiii")


def grouped_lora_(y: Tensor, x: Tensor, down: Tensor, up: Tensor, starts: Tensor, owners: Tensor) -> Tensor:
    """Add each token's update; returns y.

    Args:
        y: [T, out].
        x: [T, in], in the dtype of y.
        down: [in, ΣR], contiguous, in the dtype of x or, where that is emulated, in float32.
        up: [ΣR, out], as `down`.
        starts: int32 [groups + 1]: first rank of each group, and one past the last.
        owners: int32 [T]: each token's group; -1: none.
    """
    _check(y, x, down, up, starts, owners)
    if by_triton(x):
        from multimodal_gen.kernels.gpu.grouped_lora import grouped_lora_ as on_gpu

        return on_gpu(y, x, down, up, starts, owners)
    function = _native.of(x)
    if function is None or down.dtype != x.dtype or len(up) > MOST_RANKS or x.stride(1) != 1 or y.stride(1) != 1:
        return _by_torch(y, x, down, up, starts, owners)
    pointers = (y.data_ptr(), x.data_ptr(), down.data_ptr(), up.data_ptr(), starts.data_ptr(), owners.data_ptr())
    function(*pointers, len(x), *down.shape[:1], y.shape[1], down.shape[1], x.stride(0), y.stride(0))
    return y


def _check(y: Tensor, x: Tensor, down: Tensor, up: Tensor, starts: Tensor, owners: Tensor) -> None:
    assert x.dim() == y.dim() == 2, (x.shape, y.shape)
    assert len(x) == len(y) == len(owners), (x.shape, y.shape, owners.shape)
    assert down.shape == (x.shape[1], up.shape[0]), (x.shape, down.shape, up.shape)
    assert up.shape[1] == y.shape[1], (up.shape, y.shape)
    assert x.dtype == y.dtype, (x.dtype, y.dtype)
    assert down.dtype == up.dtype, (down.dtype, up.dtype)
    assert down.is_contiguous(), down.stride()
    assert up.is_contiguous(), up.stride()
    assert starts.dtype == owners.dtype == torch.int32, (starts.dtype, owners.dtype)
    assert x.device == y.device == down.device == up.device == starts.device == owners.device, "all on one device"


def _by_torch(y: Tensor, x: Tensor, down: Tensor, up: Tensor, starts: Tensor, owners: Tensor) -> Tensor:
    """One product for all groups, whose numbers of other tokens' groups become zero: three operations."""
    hidden = torch.mm(x.to(down.dtype), down)
    hidden.masked_fill_(_others(starts, owners, down.shape[1]), 0.0)  # not by a product: they may have overflowed
    return y.addmm_(hidden, up) if up.dtype == y.dtype else y.add_((hidden @ up).to(y.dtype))


def _others(starts: Tensor, owners: Tensor, total: int) -> Tensor:
    """bool [T, ΣR]: ranks that a token does not compute with."""
    groups = torch.arange(len(starts) - 1, dtype=torch.int32, device=starts.device)
    places = groups.repeat_interleave(starts.diff(), output_size=total)
    return owners[:, None] != places


def reference(y: Tensor, x: Tensor, down: Tensor, up: Tensor, starts: Tensor, owners: Tensor) -> Tensor:
    """A new y: token by token in float32, rounded once."""
    found, edges = y.clone(), starts.tolist()
    for token, owner in enumerate(owners.tolist()):
        if owner >= 0:
            own = slice(edges[owner], edges[owner + 1])
            hidden = x[token].float() @ down[:, own].float()
            found[token] = (y[token].float() + hidden @ up[own].float()).to(y.dtype)
    return found
