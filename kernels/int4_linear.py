"""y [T, out] = x [T, in] · Wᵀ with W in 4 bits per number, and a scale and an offset per 32 of them, on a CPU.

torch's kernel is for few tokens at a time, which wait for the weights; it takes any number, at a third of the speed of
wider weights from some dozens on. Blocks of 32 with a smallest number are those of GGUF's Q4_1, whose weights come
through with nothing but their scales rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels.eager import eager_break

GROUP = 32  # neighbours in a row that share a scale
LEVELS = 16
ROWS = 16  # the kernel takes outputs in multiples of it


class Int4Weight:
    """A quantised weight as layers hold it (`nn.linear.Packed`)."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` [out, in], in the dtype of what it will be multiplied with; it may be let go of afterwards."""
        numbers, self._scales = quantize(weight)
        self._packed: Tensor = torch._convert_weight_to_int4pack_for_cpu(numbers, 1)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._packed.nbytes + self._scales.nbytes

    @eager_break
    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → [T, out]."""
        assert x.dtype == self._scales.dtype, (x.dtype, self._scales.dtype)
        y = torch._weight_int4pack_mm_for_cpu(x.contiguous(), self._packed, GROUP, self._scales)
        return y if bias is None else y.add_(bias)


def fits(rows: int, columns: int) -> bool:
    """Whether a weight [rows, columns] can be stored so."""
    return rows % ROWS == 0 and columns % GROUP == 0


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W [out, in] → int32 [out, in] of 0 … 15, and (scale, middle) [in / 32, out, 2] in the dtype of W.

    A number n stands for (n - 8) · scale + middle; 0 and 15 are the smallest and the largest of their group.
    """
    assert fits(*weight.shape), weight.shape
    groups = weight.float().unflatten(1, (-1, GROUP))  # [out, G, 32]
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / (LEVELS - 1)).to(weight.dtype)
    middle = (low + LEVELS // 2 * scale.float()).to(weight.dtype)
    divisors = scale.float().where(scale != 0, 1.0)[..., None]  # groups of equal numbers
    numbers = ((groups - middle.float()[..., None]) / divisors).round_().add_(LEVELS // 2).clamp_(0, LEVELS - 1)
    return numbers.to(torch.int32).flatten(1), torch.stack((scale, middle), -1).transpose(0, 1).contiguous()


def reference(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x [T, in] with what `quantize` gave → [T, out], in float32, rounded once."""
    scale, middle = scales.float().transpose(0, 1)[..., None].unbind(2)  # [out, G, 1]
    weight = ((numbers.unflatten(1, (-1, GROUP)) - LEVELS // 2) * scale + middle).flatten(1)
    return F.linear(x.float(), weight).to(x.dtype)
