"""A norm of what a gate lets through, or the gate of what a norm gives: Mamba2's gated norm (Dao and Gu, 2024).

y [T, D] = norm(x · silu(gate)) · weight + bias, or (norm(x) · weight + bias) · silu(gate), the norm over each of G
groups of D / G numbers (reference: mamba_ssm `layernorm_gated`). Bytes: x and gate once, y once.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels import native
from multimodal_gen.kernels.norm_modulate import address

Kind = Literal["rms", "layer"]
Order = Literal["gate_first", "norm_first"]

_gated_norm = native.Function("gated_norm", "pppppiiiiif")


def gated_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    kind: Kind = "rms",
    groups: int = 1,
    order: Order = "gate_first",
) -> Tensor:
    """The norm of x and its gate, in float32, rounded once.

    Args:
        x: [T, D], rows of any stride.
        gate: as x; None: no gate.
        weight: [D], in the dtype of x or float32.
        bias: as weight, or None.
        eps: of the mean square of a group.
        groups: G, a divisor of D.
        order: whether the gate is applied before the norm or after it.

    Returns: [T, D].
    """
    _check(x, gate, weight, bias, groups)
    if native.by_triton(x):
        from multimodal_gen.kernels.gpu import gated_norm

        return gated_norm.gated_norm(x, gate, weight, bias, eps, kind=kind, groups=groups, order=order)
    compute = _gated_norm.of(x)
    if compute is None:
        return reference(x, gate, weight, bias, eps, kind=kind, groups=groups, order=order)
    x, gate = x.contiguous(), None if gate is None else gate.contiguous()
    weight, bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
    y = torch.empty_like(x)
    pointers = x.data_ptr(), address(gate), weight.data_ptr(), address(bias)
    choices = groups, kind == "layer", order == "gate_first"
    compute(*pointers, y.data_ptr(), *x.shape, *choices, eps)
    return y


def _check(x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    assert x.dim() == 2, x.shape
    assert x.shape[1] % groups == 0, f"{groups} groups do not divide {x.shape[1]}"
    if gate is not None:
        assert gate.shape == x.shape, (gate.shape, x.shape)
        assert gate.dtype == x.dtype, (gate.dtype, x.dtype)
        assert gate.device == x.device, (gate.device, x.device)
    assert weight.shape == x.shape[1:], (weight.shape, x.shape)
    assert weight.dtype in (x.dtype, torch.float32), (weight.dtype, x.dtype)
    assert weight.device == x.device, (weight.device, x.device)
    if bias is not None:
        assert bias.shape == weight.shape, (bias.shape, weight.shape)
        assert bias.dtype == weight.dtype, (bias.dtype, weight.dtype)
        assert bias.device == x.device, (bias.device, x.device)


def reference(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    kind: Kind = "rms",
    groups: int = 1,
    order: Order = "gate_first",
) -> Tensor:
    """The same in float32 steps, rounded once."""
    y = x.float()
    if gate is not None and order == "gate_first":
        y = y * F.silu(gate.float())
    y = y.unflatten(1, (groups, -1))
    if kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(1) * weight.float()
    if bias is not None:
        y = y + bias.float()
    if gate is not None and order == "norm_first":
        y = y * F.silu(gate.float())
    return y.to(x.dtype)
