"""A·B in float32, and its sum with another matrix, on a CPU.

torch hands matrix products in float32 to the BLAS that it was built with, which uses a third to a half of what some
processors can do (MKL on a Zen 5: 0.21 TFLOP/s on two cores, oneDNN 0.43). A 1x1 convolution is the same product and
goes to oneDNN. The reference is `torch.mm`.

The result does not depend on the number of threads: from some length of the sum on, oneDNN would share it out among
them, so long sums are made of short ones, in order. Weights that one thread merges while they stream are the bits of
those that several merge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SUMMED = 128  # numbers that are summed at a time
THIN = (
    64  # up to this length of the sum, memory is the limit: the BLAS adds in place, and a third of the traffic is saved
)


def add_product_(total: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """total [m, n] += scale · a [m, r] · b [r, n], all float32, on one device; returns total."""
    if a.device.type != "cpu" or a.shape[1] <= THIN:
        return total.addmm_(a, b, alpha=scale)
    return total.add_(float32_product(a, b), alpha=scale)


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, r] · b [r, n] → [m, n]; all float32, on one device. Fastest where bᵀ is contiguous."""
    assert a.dtype == b.dtype == torch.float32, (a.dtype, b.dtype)
    assert a.shape[1] == b.shape[0], (a.shape, b.shape)
    if a.device.type != "cpu":
        return reference(a, b)
    total = _product(a[:, :SUMMED], b[:SUMMED])
    for start in range(SUMMED, a.shape[1], SUMMED):
        total += _product(a[:, start : start + SUMMED], b[start : start + SUMMED])
    return total


def _product(a: Tensor, b: Tensor) -> Tensor:
    # [1, r, 1, m] in channels-last order is `a` as it lies in memory, and the result is [m, n] as it should lie.
    pixels = a[None, None].permute(0, 3, 1, 2)
    return F.conv2d(pixels, b.T[:, :, None, None]).permute(0, 2, 3, 1)[0, 0]


def reference(a: Tensor, b: Tensor) -> Tensor:
    """The same by matrix product."""
    return torch.mm(a, b)
