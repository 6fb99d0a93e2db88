"""y [T, out] = x [T, in] · Wᵀ with both in 8 bits: one scale per token, worked out on the way, and one per output.

Sums are exact (int32), so all that is lost is lost by rounding x and W. Processors with VNNI or AMX do two such
products where they do one in bfloat16; CUDA devices have `torch._int_mm`. Outliers cost the most: a token's scale is
that of its largest number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels.eager import eager_break

LARGEST = 127
MIDDLE = 128  # what is added to x on a CPU, whose instruction multiplies numbers without a sign by such with one
LEAST_ROWS = 17  # that torch._int_mm takes
MULTIPLE = 8  # of in and out, the same


def unavailable(device: torch.device) -> str:
    """Why these products cannot be had on a device, or an empty string."""
    if device.type == "cuda":
        return ""
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return "this processor has no products of 8-bit numbers (VNNI or AMX)"
    return "" if torch.backends.mkldnn.is_available() else "this torch is built without oneDNN"


def fits(rows: int, columns: int, device: torch.device) -> bool:
    """Whether a weight [rows, columns] can be multiplied so."""
    return device.type == "cpu" or (rows % MULTIPLE == 0 and columns % MULTIPLE == 0)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of W [out, in], or tokens x [T, in] → int8 of the same shape, and their scales float32 [out]: the largest
    number of a row is ± 127."""
    wide = weight.float()
    scales = wide.abs().amax(1) / LARGEST
    numbers = (wide / scales.where(scales != 0, 1.0)[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scales


class Int8Weight:
    """A weight as layers hold it (`nn.linear.Packed`), on a CPU in the order of its matrix unit."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` [out, in] may be let go of afterwards."""
        why = unavailable(weight.device)
        assert not why, why
        numbers, self._scales = quantize(weight)
        self.nbytes = numbers.nbytes + 3 * self._scales.nbytes
        self._on_cpu = weight.device.type == "cpu"
        if self._on_cpu:
            # Σ (x + 128) · w = Σ x · w + 128 · Σ w
            self._correction = numbers.sum(1, dtype=torch.int32) * self._scales * -MIDDLE
            self._zeros = torch.zeros(len(numbers), dtype=torch.int64)
            numbers = torch.ops.onednn.qlinear_prepack(numbers, [32, numbers.shape[1]])
        self._numbers = numbers

    @eager_break
    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → [T, out]."""
        numbers, scales = quantize(x)
        y = (self._on_cpu_ if self._on_cpu else self._on_cuda)(numbers, scales, x.dtype)
        return y if bias is None else y.add_(bias)

    def _on_cuda(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        missing = max(0, LEAST_ROWS - len(numbers))
        rows = F.pad(numbers, (0, 0, 0, missing)) if missing else numbers
        sums = torch._int_mm(rows, self._numbers.T)[: len(numbers)]
        return (sums * self._scales * scales[:, None]).to(dtype)

    def _on_cpu_(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        u8 = (numbers.to(torch.int16) + MIDDLE).to(torch.uint8)
        if not len(u8):
            return torch.empty(0, len(self._scales), dtype=dtype)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(u8, 1.0, 0, self._numbers, self._scales, self._zeros, self._correction),
            *(1.0, 0, dtype, "none", [], ""),
        )
        return y.mul_(scales[:, None])


def reference(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x [T, in] with what `quantize` gave of W → [T, out], in float32, rounded once."""
    tokens, own = quantize(x)
    y = F.linear(tokens.double(), numbers.double()) * own[:, None] * scales
    return y.to(x.dtype)
