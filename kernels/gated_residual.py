"""What a layer adds to the stream of tokens, and the norm that reads the sum next: x [T, D] += gate · y, in place.

With `eps`, y is divided by its root mean square first (sandwich norms: Ding et al., 2021), and `gate` holds the norm's
weight, too. The next norm works on the sum as rounded and stored, so the result is that of the two operations one after
another. Bytes: x read and written once, y once, the result of the norm once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multimodal_gen.kernels import native
from multimodal_gen.kernels.norm_modulate import (
    Norm,
    address,
    check_alike,
    check_rows,
    norm_modulate_reference,
    of_tokens,
    over_rms,
)

_add = native.Function("gated_residual", "ppppiiif")
_add_norm = native.Function("gated_residual_norm", "ppppifpppiifpii")


def gated_residual_(
    x: Tensor, y: Tensor, gate: Tensor | None, index: Tensor | None, eps: float | None = None
) -> Tensor:
    """x += gate[index] · y, or gate[index] · y / rms(y), in float32 and rounded once; returns x.

    Args:
        x: [T, D], contiguous, overwritten.
        y: [T, D] in the dtype of x.
        gate: [S, D] in the dtype of x or float32; None: ones.
        index: int32 [T]: the row of gate of each token; None: the first row.
        eps: of the mean square of y; None: y is taken as it is.
    """
    _check(x, y, gate, index)
    if native.by_triton(x):
        from multimodal_gen.kernels.gpu import gated_residual

        return gated_residual.gated_residual_(x, y, gate, index, eps)
    compute = _add.of(x)
    if compute is None:
        return gated_residual_reference_(x, y, gate, index, eps)
    y, gate = y.contiguous(), None if gate is None else gate.contiguous()
    compute(x.data_ptr(), y.data_ptr(), address(gate), address(index), _wide(x, gate), *x.shape, _eps(eps))
    return x


def gated_residual_norm_(
    x: Tensor, y: Tensor, gate: Tensor | None, index: Tensor | None, eps: float | None, norm: Norm
) -> Tensor:
    """`gated_residual_`, then `norm_modulate` of the sum; returns the result of the norm, [T, D].

    Args as of `gated_residual_`; `norm` reads x, and has an index of its own.
    """
    _check(x, y, gate, index)
    check_rows(x, norm.scale, norm.index)
    check_alike(norm.scale, norm.shift)
    assert norm.kind == "layer" or norm.shift is None, "RMS norms have no shift"
    if native.by_triton(x):
        from multimodal_gen.kernels.gpu import gated_residual

        return gated_residual.gated_residual_norm_(x, y, gate, index, eps, norm)
    compute = _add_norm.of(x)
    if compute is None:
        return gated_residual_norm_reference_(x, y, gate, index, eps, norm)
    y, gate = y.contiguous(), None if gate is None else gate.contiguous()
    scale, shift = norm.scale.contiguous(), None if norm.shift is None else norm.shift.contiguous()
    out = torch.empty_like(x)
    compute(
        x.data_ptr(),
        y.data_ptr(),
        address(gate),
        address(index),
        _wide(x, gate),
        _eps(eps),
        scale.data_ptr(),
        address(shift),
        address(norm.index),
        _wide(x, scale),
        norm.kind == "layer",
        norm.eps,
        out.data_ptr(),
        *x.shape,
    )
    return out


def _wide(x: Tensor, rows: Tensor | None) -> bool:
    return rows is not None and rows.dtype != x.dtype


def _eps(eps: float | None) -> float:
    """Below zero: no norm."""
    return -1.0 if eps is None else eps


def _check(x: Tensor, y: Tensor, gate: Tensor | None, index: Tensor | None) -> None:
    assert x.is_contiguous(), x.stride()
    assert x.shape == y.shape, (x.shape, y.shape)
    assert x.dtype == y.dtype, (x.dtype, y.dtype)
    assert x.device == y.device, (x.device, y.device)
    if gate is None:
        assert index is None, "an index without a gate"
    else:
        check_rows(x, gate, index)


def gated_residual_reference_(
    x: Tensor, y: Tensor, gate: Tensor | None, index: Tensor | None, eps: float | None = None
) -> Tensor:
    """The same in float32 steps, rounded once."""
    if eps is None and gate is None:
        return x.add_(y)
    added = y.float() if eps is None else over_rms(y, eps)
    return x.copy_((added if gate is None else added * of_tokens(gate, index)).add_(x))


def gated_residual_norm_reference_(
    x: Tensor, y: Tensor, gate: Tensor | None, index: Tensor | None, eps: float | None, norm: Norm
) -> Tensor:
    """The same, one after another."""
    return norm_modulate_reference(gated_residual_reference_(x, y, gate, index, eps), norm)
