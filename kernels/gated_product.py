"""The activations between two matrix products: gated ones (Shazeer, 2020), and GELU in place.

Bytes: what the first product wrote once, the result once.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels import native
from multimodal_gen.kernels.norm_modulate import address

Activation = Literal["silu", "gelu_tanh"]

_gated_product = native.Function("gated_product", "pipipiii")
_gelu_tanh = native.Function("gelu_tanh", "ppii")


def gated_product(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """activation(gate) · up, in float32, rounded once.

    Args:
        gate, up: [T, F], rows of any stride: most often the halves of one product.
        activation: `gelu_tanh` is GELU by its tanh approximation (Hendrycks and Gimpel, 2016).

    Returns: [T, F].
    """
    assert gate.dim() == 2, gate.shape
    assert gate.shape == up.shape, (gate.shape, up.shape)
    assert gate.dtype == up.dtype, (gate.dtype, up.dtype)
    assert gate.device == up.device, (gate.device, up.device)
    if native.by_triton(gate):
        from multimodal_gen.kernels.gpu import gated_product

        return gated_product.gated_product(gate, up, activation)
    compute = _gated_product.of(gate)
    if compute is None:
        return gated_product_reference(gate, up, activation)
    gate, up = _rows(gate), _rows(up)
    y = gate.new_empty(gate.shape)
    places = gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0)
    compute(*places, y.data_ptr(), *y.shape, activation == "gelu_tanh")
    return y


def gelu_tanh_(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU by its tanh approximation of x [T, F] + bias [F], in float32, rounded once, in place; returns x."""
    assert x.dim() == 2, x.shape
    assert x.is_contiguous(), x.stride()
    if bias is not None:
        assert bias.shape == x.shape[1:], (bias.shape, x.shape)
        assert bias.dtype == x.dtype, (bias.dtype, x.dtype)
        assert bias.device == x.device, (bias.device, x.device)
        assert bias.is_contiguous(), bias.stride()
    if native.by_triton(x):
        from multimodal_gen.kernels.gpu import gated_product

        return gated_product.gelu_tanh_(x, bias)
    compute = _gelu_tanh.of(x)
    if compute is None:
        return gelu_tanh_reference_(x, bias)
    compute(x.data_ptr(), address(bias), *x.shape)
    return x


def gated_product_reference(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """The same in float32 steps, rounded once."""
    wide = gate.float()
    return (F.silu(wide) if activation == "silu" else F.gelu(wide, approximate="tanh")).mul_(up).to(gate.dtype)


def gelu_tanh_reference_(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in float32 steps, rounded once."""
    wide = x.float() if bias is None else x.float() + bias.float()
    return x.copy_(F.gelu(wide, approximate="tanh"))


def _rows(x: Tensor) -> Tensor:
    """x [T, F] with numbers side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
