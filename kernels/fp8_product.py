"""y [T, out] = x [T, in] · Wᵀ with both in 8-bit floating point (e4m3), a scale per token and one per output, on CUDA.

torch hands it to cuBLAS (`torch._scaled_mm`); tokens are rounded in one pass (gpu/quantize_rows.py). Numbers too small
for the scale of their row are rounded, not lost: e4m3 has 3 bits of fraction down to 2⁻⁶ of its unit, and reaches 448.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels import native
from multimodal_gen.kernels.int8_product import WIDEST

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
MULTIPLE = 16  # of in and out: what cuBLAS takes
OLDEST = (8, 9)  # compute capability with such products


def unavailable(device: torch.device) -> str:
    """Why these products cannot be had on a device, or an empty string."""
    if device.type != "cuda":
        return "8-bit floating point is multiplied on GPUs only"
    found = torch.cuda.get_device_capability(device)
    return "" if found >= OLDEST else f"its compute capability is {found[0]}.{found[1]}, and 8.9 is the oldest with fp8"


def fits(rows: int, columns: int, device: torch.device) -> bool:
    """Whether a weight [rows, columns] can be multiplied so."""
    return rows % MULTIPLE == 0 and columns % MULTIPLE == 0


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of W [out, in], or tokens x [T, in] → e4m3 of the same shape, and their scales float32 [out]."""
    if native.by_triton(weight) and weight.shape[1] <= WIDEST:
        from multimodal_gen.kernels.gpu.quantize_rows import quantize_rows

        return quantize_rows(weight, FORMAT, LARGEST)
    return quantize_reference(weight)


def quantize_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch."""
    wide = weight.float()
    scales = wide.abs().amax(1) / LARGEST
    scaled = wide / scales.where(scales != 0, 1.0)[:, None]
    return scaled.clamp_(-LARGEST, LARGEST).to(FORMAT), scales


class Fp8Weight:
    """A weight as layers hold it (`nn.linear.Packed`)."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` [out, in] may be let go of afterwards."""
        self._numbers, self._scales = quantize(weight)
        self.nbytes = self._numbers.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] in bfloat16 → [T, out]."""
        numbers, scales = quantize(x)
        y: Tensor = torch._scaled_mm(
            *(numbers, self._numbers.T),
            scale_a=scales[:, None],
            scale_b=self._scales[None],
            out_dtype=x.dtype,
            use_fast_accum=True,  # an H100: 18 % less time on large products, and the same four digits of the error
        )
        return y if bias is None else y.add_(bias)


def reference(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x [T, in] with what `quantize` gave of W → [T, out], in float32, rounded once."""
    tokens, own = quantize_reference(x)
    y = F.linear(tokens.float(), numbers.float()) * own[:, None] * scales
    return y.to(x.dtype)
