"""y [T, out] = x [T, in] · Wᵀ with W in 8 bits per number and one scale per output, on a CPU.

A few tokens at a time wait for the weights, which are read in half the bytes; torch has a kernel for that. From some
number of rows on it would read them again and again, so they are widened once and multiplied as any others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels.eager import eager_break

NARROW = 8  # rows up to which torch's kernel is the faster way (Zen 5: equal at about 16)
VECTOR = 16  # numbers that torch's kernel reads at a time; it would read beyond the end of a row of another length
LARGEST = 127


class Int8Weight:
    """A quantised weight as layers hold it (`nn.linear.Packed`)."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` [out, in], in the dtype of what it will be multiplied with; it may be let go of afterwards."""
        self._numbers, self._scales = quantize(weight)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._numbers.nbytes + self._scales.nbytes

    @eager_break(recorded=True)
    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → [T, out]."""
        y = int8_linear(x, self._numbers, self._scales)
        return y if bias is None else y.add_(bias)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W [out, in] → int8 [out, in] and scales [out] in the dtype of W; the largest number of a row is ± 127."""
    scales = (weight.abs().amax(1).float() / LARGEST).to(weight.dtype)
    divisors = scales.float().where(scales != 0, 1.0)  # rows of zeros
    numbers = (weight.float() / divisors[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scales


def int8_linear(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x [T, in], numbers int8 [out, in], scales [out] in the dtype of x → [T, out]."""
    assert numbers.dtype == torch.int8, numbers.dtype
    assert x.dtype == scales.dtype, (x.dtype, scales.dtype)
    if x.is_cpu and len(x) <= NARROW and x.shape[1] % VECTOR == 0:
        return torch._weight_int8pack_mm(x.contiguous(), numbers, scales)
    return F.linear(x, numbers.to(x.dtype)).mul_(scales)


def reference(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """The same in float32, rounded once."""
    return F.linear(x.float(), numbers.float() * scales.float()[:, None]).to(x.dtype)
