"""y [T, out] = x [T, in] · Wᵀ with W in blocks of 32 outputs, in our own C++ (AVX-512, with BF16 or VNNI), on a CPU.

Made for few rows, which wait for the weight: it is read from one end to the other, each block once for up to twelve
rows, while the next block is fetched. W is in the dtype of x, or in int8 with a scale per output; then each row of x
becomes int8 too, with a scale of its own (W8A8, dynamic per token), and products are exact sums of integers.

`blocked_swiglu` is silu(gate) · up (Shazeer, 2020) of a weight that holds both: the product itself is not written.

Measured on two Zen 5 cores over the 269 MB of SmolLM2's weights in bfloat16, milliseconds, beside oneDNN's packed form:
1 row 4.4 (6.3), 8 rows 5.7 (8.7), 32 rows 10.4 (15.8), 256 rows 70 (78); in int8 2.8, 3.7, 6.6 and 41.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels import native
from multimodal_gen.kernels.eager import eager_break

BLOCK = 32  # outputs that lie together
LARGEST = 127

_KIND = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # as blocked_linear_has tells them
_plain = native.Function("blocked_linear", "pppppii")
_int8 = native.Function("blocked_linear_int8", "pppppii")
_plain_swiglu = native.Function("blocked_swiglu", "pppppii")
_int8_swiglu = native.Function("blocked_swiglu_int8", "pppppii")


class CWeight(ctypes.Structure):
    """`Weight` of cpu/blocked.hpp."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("halves", ctypes.c_int64),
    )


def unavailable(shape: Sequence[int], dtype: torch.dtype, rows: torch.dtype) -> str:
    """Why weights [out, in] held in `dtype` cannot be multiplied with such rows here, or an empty string."""
    outputs, inputs = shape
    if dtype not in (rows, torch.int8):
        return f"weights are {dtype} and rows {rows}"
    if outputs % BLOCK or inputs % BLOCK:
        return f"{outputs} outputs and {inputs} inputs are not multiples of {BLOCK}"
    if _plain.of(torch.empty(0, dtype=rows, device="cpu")) is None:
        return native.unavailable() or f"there is no kernel for {rows}"
    if dtype is not torch.float32 and torch.cpu._is_amx_tile_supported():
        return "oneDNN multiplies by tiles (AMX) here, which this kernel does not"
    if not _kinds() & _KIND[dtype]:
        return f"this processor has no AVX-512 for {dtype}"
    return ""


def _kinds() -> int:
    library = native.library()
    assert library is not None
    found = ctypes.c_int64()
    library.blocked_linear_has(ctypes.byref(found))
    return found.value


class BlockedWeight:
    """A weight as layers hold it (`nn.linear.Packed`)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype | None = None, halves: bool = False) -> None:
        """
        Args:
            weight: [out, in] in the dtype of the rows; it may be let go of afterwards.
            dtype: int8, or that of the weight.
            halves: a block holds sixteen outputs of the first half and their mates of the second, for who needs both at
                once (gate and up); rows come out in their own order all the same.
        """
        why = unavailable(weight.shape, dtype or weight.dtype, weight.dtype)
        assert not why, why
        assert weight.is_cpu, weight.device
        self.rows_dtype, self.halves = weight.dtype, halves
        self.outputs, self.inputs = weight.shape
        self.scales: Tensor | None = None  # int8 only: float32 [out]
        self.sums: Tensor | None = None  # int8 only: int32 [out], 128 times the sum of each output's numbers
        if dtype is torch.int8:
            weight, self.scales = quantize(weight)
            self.sums = weight.sum(1, dtype=torch.int32).mul_(128)
        self.words = to_blocks(weight, halves)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.words.nbytes + sum(tensor.nbytes for tensor in (self.scales, self.sums) if tensor is not None)

    @property
    def is_int8(self) -> bool:
        """Whether rows become int8 too."""
        return self.scales is not None

    def pointers(self, bias: Tensor | None) -> CWeight:
        """For C; valid while this weight and the bias are held."""
        return CWeight(
            words=self.words.data_ptr(),
            scales=None if self.scales is None else self.scales.data_ptr(),
            sums=None if self.sums is None else self.sums.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            outputs=self.outputs,
            length=self.inputs * self.words.itemsize // 4,
            halves=self.halves,
        )

    def plain(self) -> Tensor:
        """[out, in] as before, in the dtype that it is held in."""
        return from_blocks(self.words, self.halves)

    @eager_break
    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → [T, out]."""
        return blocked_linear(x, self, bias)

    @eager_break
    def swiglu(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → [T, out / 2], of a weight in `halves`."""
        return blocked_swiglu(x, self, bias)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W [out, in] → int8 [out, in] and float32 scales [out]; the largest number of an output is ± 127."""
    wide = weight.float()
    scales = wide.abs().amax(1) / LARGEST
    numbers = (wide / scales.where(scales != 0, 1.0)[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scales


def to_blocks(weight: Tensor, halves: bool) -> Tensor:
    """W [out, in] → [out / 32, in / n, 32, n], where n numbers of an output are a word of 32 bits."""
    rows, columns = weight.shape
    per_word = 4 // weight.itemsize
    library = None if native.switched_off() else native.library()
    if library is not None:
        weight = weight.contiguous()
        made = torch.empty(rows // BLOCK, columns // per_word, BLOCK, per_word, dtype=weight.dtype, device="cpu")
        pointers = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(made.data_ptr())
        library.blocked_pack(*pointers, *map(ctypes.c_int64, (rows, columns // per_word, halves)))
        return made
    by_block = weight.view(2, -1, BLOCK // 2, columns).transpose(0, 1) if halves else weight.view(-1, BLOCK, columns)
    words = by_block.reshape(rows // BLOCK, BLOCK, columns // per_word, per_word)
    return words.transpose(1, 2).contiguous()


def from_blocks(words: Tensor, halves: bool) -> Tensor:
    """What `to_blocks` was given."""
    by_block = words.transpose(1, 2).flatten(2)  # [out / 32, 32, in]
    if halves:
        by_block = by_block.unflatten(1, (2, -1)).transpose(0, 1)
    return by_block.reshape(-1, by_block.shape[-1])


def blocked_linear(x: Tensor, weight: BlockedWeight, bias: Tensor | None = None) -> Tensor:
    """x [T, in] · Wᵀ + bias → [T, out]."""
    _check(x, weight, bias)
    compute = (_int8 if weight.is_int8 else _plain).of(x)
    if compute is None:
        return reference(x, weight, bias)
    return _multiply(compute, x, weight, bias, weight.outputs)


def blocked_swiglu(x: Tensor, weight: BlockedWeight, bias: Tensor | None = None) -> Tensor:
    """silu(g) · u → [T, out / 2], where g is the first half of x [T, in] · Wᵀ + bias and u the second; rounded once."""
    _check(x, weight, bias)
    assert weight.halves, "gate and up do not lie together in this weight"
    compute = (_int8_swiglu if weight.is_int8 else _plain_swiglu).of(x)
    if compute is None:
        return swiglu_reference(x, weight, bias)
    return _multiply(compute, x, weight, bias, weight.outputs // 2)


def _check(x: Tensor, weight: BlockedWeight, bias: Tensor | None) -> None:
    assert x.dim() == 2, x.shape
    assert x.shape[1] == weight.inputs, (x.shape, weight.inputs)
    assert x.dtype == weight.rows_dtype, (x.dtype, weight.rows_dtype)
    assert bias is None or (bias.shape == (weight.outputs,) and bias.dtype == x.dtype), "the bias is of the rows' dtype"


def _multiply(compute: native.CFunction, x: Tensor, weight: BlockedWeight, bias: Tensor | None, outputs: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
    numbers, scales = int8_rows(len(x), weight.inputs) if weight.is_int8 else (None, None)
    compute(
        x.data_ptr(),
        y.data_ptr(),
        ctypes.byref(weight.pointers(bias)),
        None if numbers is None else numbers.data_ptr(),
        None if scales is None else scales.data_ptr(),
        *x.shape,
    )
    return y


def int8_rows(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Memory for rows in int8 and their scales."""
    numbers = torch.empty(rows, width, dtype=torch.uint8, device="cpu")
    return numbers, torch.empty(rows, dtype=torch.float32, device="cpu")


def reference(x: Tensor, weight: BlockedWeight, bias: Tensor | None) -> Tensor:
    """The same in float32, rounded once; rows rounded to int8 where the weight is."""
    return _in_float32(x, weight, bias).to(x.dtype)


def swiglu_reference(x: Tensor, weight: BlockedWeight, bias: Tensor | None) -> Tensor:
    """Likewise."""
    gate, up = _in_float32(x, weight, bias).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def _in_float32(x: Tensor, weight: BlockedWeight, bias: Tensor | None) -> Tensor:
    wide, plain = x.float(), weight.plain().float()
    if weight.scales is not None:
        numbers, scales = quantize(x)
        y = F.linear(numbers.float(), plain) * scales[:, None] * weight.scales
    else:
        y = F.linear(wide, plain)
    return y if bias is None else y + bias.float()
