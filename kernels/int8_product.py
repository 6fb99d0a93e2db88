"""y [T, out] = x [T, in] · Wᵀ with both in 8 bits: one scale per token, worked out on the way, and one per output.

Sums are exact (int32), so all that is lost is lost by rounding x and W. Processors with VNNI or AMX do two such
products where they do one in bfloat16, GPUs as well; both through `torch._int_mm`. Outliers cost the most: a token's
scale is that of its largest number.

On a CPU the sums are made some tokens at a time, so that they are still in the cache when they are scaled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels import native
from multimodal_gen.kernels.eager import eager_break
from multimodal_gen.kernels.native import Function

LARGEST = 127
LEAST_ROWS = 17  # that torch._int_mm takes on CUDA
WIDEST = 32768  # row that the Triton kernel has registers for
MULTIPLE = 8  # of in and out, the same
SUMS_BYTES = 16 << 20  # of sums at a time: half of the last cache of the processors that this was tuned on

_quantize_rows = Function("int8_quantize_rows", "pppii")
_finish = Function("int8_finish", "pppppii")


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


class Int8Weight:
    """A weight as layers hold it (`nn.linear.Packed`)."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` [out, in] may be let go of afterwards."""
        why = unavailable(weight.device)
        assert not why, why
        numbers, self._scales = quantize(weight)
        # [in, out] either way: as processors read it, or the turned view that cuBLAS asks for.
        self._numbers = numbers.T.contiguous() if weight.is_cpu else numbers.T
        self.nbytes = numbers.nbytes + self._scales.nbytes

    @eager_break(recorded=True)
    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → [T, out]."""
        numbers, scales = quantize(x)
        if not x.is_cpu:
            return finish(_sums_on_cuda(numbers, self._numbers), scales, self._scales, bias, x.dtype)
        tokens, outputs = len(numbers), len(self._scales)
        y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
        step = max(1, SUMS_BYTES // (4 * outputs))
        sums = torch.empty(min(step, tokens), outputs, dtype=torch.int32, device=x.device)
        for start in range(0, tokens, step):
            some = slice(start, min(start + step, tokens))
            made = torch._int_mm(numbers[some], self._numbers, out=sums[: some.stop - start])
            finish(made, scales[some], self._scales, bias, x.dtype, y[some])
        return y


def _sums_on_cuda(numbers: Tensor, weight: Tensor) -> Tensor:
    missing = max(0, LEAST_ROWS - len(numbers))
    rows = F.pad(numbers, (0, 0, 0, missing)) if missing else numbers
    return torch._int_mm(rows, weight)[: len(numbers)]


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens x [T, in], or a weight [out, in] → int8 of the same shape and scales float32 [T]; the largest number of a
    row is ± 127. A row with NaN has a scale that is not finite."""
    if native.by_triton(x) and x.shape[1] <= WIDEST:
        from multimodal_gen.kernels.gpu.quantize_rows import quantize_rows

        return quantize_rows(x, torch.int8, LARGEST)
    x = x.contiguous()
    function = _quantize_rows.of(x)
    if function is None:
        return quantize_reference(x)
    numbers = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    function(x.data_ptr(), numbers.data_ptr(), scales.data_ptr(), *x.shape)
    return numbers, scales


def quantize_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch."""
    wide = x.float()
    scales = (wide.abs().amax(1) if x.shape[1] else wide.new_zeros(len(x))) / LARGEST
    return (wide / scales.where(scales > 0, 1.0)[:, None]).round_().to(torch.int8), scales


def finish(
    sums: Tensor, tokens: Tensor, outputs: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """sums int32 [T, out] · scales of tokens [T] · of outputs [out] + bias [out] → [T, out], maybe into `out`."""
    y = torch.empty(sums.shape, dtype=dtype, device=sums.device) if out is None else out
    assert sums.is_contiguous(), sums.stride()
    assert y.is_contiguous(), y.stride()
    assert bias is None or (bias.dtype == dtype and bias.is_contiguous()), "the bias is as the output"
    if native.by_triton(y):
        from multimodal_gen.kernels.gpu.quantize_rows import finish as by_triton

        return by_triton(sums, tokens, outputs, bias, y)
    function = _finish.of(y)
    if function is None:
        return finish_reference(sums, tokens, outputs, bias, y)
    pointers = (sums.data_ptr(), tokens.data_ptr(), outputs.data_ptr(), 0 if bias is None else bias.data_ptr())
    function(*pointers, y.data_ptr(), *y.shape)
    return y


def finish_reference(sums: Tensor, tokens: Tensor, outputs: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """The same by torch."""
    wide = sums.float() * (outputs * tokens[:, None])
    return y.copy_(wide if bias is None else wide + bias.float())


def reference(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x [T, in] with what `quantize` gave of W → [T, out]: exact sums, rounded once."""
    tokens, own = quantize_reference(x)
    return (F.linear(tokens.double(), numbers.double()) * (own[:, None] * scales).double()).to(x.dtype)
