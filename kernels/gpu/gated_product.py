"""`kernels/gated_product.py` in Triton: a program per piece of a row."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 1024  # numbers of a program


@triton.jit
def _gelu_tanh(x):
    # (1 + tanh z) / 2 is the logistic function of 2 z, so no tanh is needed.
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 · sqrt(2 / π)


@triton.jit
def _gated_product(gate_ptr, up_ptr, y_ptr, gate_row, up_row, columns, gelu: tl.constexpr, piece: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * piece + tl.arange(0, piece)
    inside = column < columns
    gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    y = (_gelu_tanh(gate) if gelu else gate * tl.sigmoid(gate)) * up
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu(x_ptr, bias_ptr, columns, piece: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * piece + tl.arange(0, piece)
    inside = column < columns
    at = x_ptr + row * columns + column
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, _gelu_tanh(x).to(x_ptr.dtype.element_ty), mask=inside)


def gated_product(gate: Tensor, up: Tensor, activation: Literal["silu", "gelu_tanh"] = "silu") -> Tensor:
    """Arguments as checked by `kernels.gated_product`."""
    gate, up = (part if part.stride(1) == 1 else part.contiguous() for part in (gate, up))
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, columns = gate.shape
    if y.numel():
        _gated_product[(rows, triton.cdiv(columns, PIECE))](
            gate, up, y, gate.stride(0), up.stride(0), columns, gelu=activation == "gelu_tanh", piece=PIECE
        )
    return y


def gelu_tanh_(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Arguments as checked by `kernels.gated_product`."""
    rows, columns = x.shape
    if x.numel():
        _bias_gelu[(rows, triton.cdiv(columns, PIECE))](x, bias, columns, piece=PIECE)
    return x
