"""What an adapter does to one weight, as a function of the pristine weight W0.

Every kind answers `add_`: total += strength · Δ(W0), in float32, for a block of output rows. Low-rank products are the
normal form; the others exist because files hold them, and can only be merged.

    LowRank     Δ = scale · B·A                                   LoRA (Hu et al., 2021)
    Full        Δ = D                                             `.diff`, biases, norms
    Hadamard    Δ = scale · (B1·A1) ⊙ (B2·A2)                     LoHa (Hyeon-Woo et al., 2021)
    Kronecker   Δ = scale · C ⊗ W                                 LoKr (Edalati et al., 2022; LyCORIS)
    Decomposed  Δ = m · V / ‖V‖ - W0 with V = W0 + inner Δ        DoRA (Liu et al., 2024)

Shapes: A [r, in], B [out, r], W0 [out, in]; biases and norms are vectors [out].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from multimodal_gen.kernels.float32_product import add_product_, float32_product

NORM_EPS = torch.finfo(torch.float32).eps


class Update(Protocol):
    """A change of one weight; immutable."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes."""

    @property
    def rank(self) -> int:
        """Of its low-rank factors; 0 where it has none."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds."""

    @property
    def merge_only(self) -> str:
        """Why it cannot run beside the weight, or an empty string."""

    @property
    def reads_base(self) -> bool:
        """Whether Δ depends on W0, and then on whole rows of it."""

    @property
    def bound(self) -> float:
        """What no |W0 + Δ| - |W0| exceeds."""

    def on(self, device: torch.device) -> Update:
        """The same in float32 on a device."""

    def take(self, rows: slice) -> Update:
        """The part for some output rows, where a file stores several layers as one, or ranks share the rows."""

    def columns(self, columns: slice) -> Update:
        """The part for some inputs, where ranks share the columns; not for what `reads_base`."""

    def add_(self, total: Tensor, base: Tensor, rows: slice, strength: float) -> None:
        """total [rows, …] += strength · Δ(W0)[rows]; base is W0[rows]; all float32."""


@dataclass(frozen=True)
class LowRank:
    """scale · B·A."""

    down: Tensor  # A [r, in]
    up: Tensor  # B [out, r]
    scale: float  # alpha / r, or alpha / √r for rank-stabilised files

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    merge_only = ""
    reads_base = False

    @property
    def bound(self) -> float:
        return abs(self.scale) * _bound_of_product(self.up, self.down)

    def on(self, device: torch.device) -> LowRank:
        return replace(self, down=_float(self.down, device), up=_float(self.up, device))

    def take(self, rows: slice) -> LowRank:
        return replace(self, up=self.up[rows])

    def columns(self, columns: slice) -> LowRank:
        return replace(self, down=self.down[:, columns])

    def add_(self, total: Tensor, base: Tensor, rows: slice, strength: float) -> None:
        add_product_(total, self.up[rows], self.down, strength * self.scale)


@dataclass(frozen=True)
class Full:
    """A difference stored whole."""

    diff: Tensor  # as the weight

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)

    rank = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.diff,)

    merge_only = "whole weight differences (.diff)"
    reads_base = False

    @property
    def bound(self) -> float:
        return _largest(self.diff)

    def on(self, device: torch.device) -> Full:
        return Full(_float(self.diff, device))

    def take(self, rows: slice) -> Full:
        return Full(self.diff[rows])

    def columns(self, columns: slice) -> Full:
        return Full(self.diff[:, columns])

    def add_(self, total: Tensor, base: Tensor, rows: slice, strength: float) -> None:
        total.add_(self.diff[rows], alpha=strength)


@dataclass(frozen=True)
class Hadamard:
    """scale · (B1·A1) ⊙ (B2·A2)."""

    up1: Tensor  # [out, r]
    down1: Tensor  # [r, in]
    up2: Tensor
    down2: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up1.shape[0], self.down1.shape[1]

    @property
    def rank(self) -> int:
        return self.down1.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.up1, self.down1, self.up2, self.down2

    merge_only = "LoHa, an elementwise product"
    reads_base = False

    @property
    def bound(self) -> float:
        first, second = _bound_of_product(self.up1, self.down1), _bound_of_product(self.up2, self.down2)
        return abs(self.scale) * first * second

    def on(self, device: torch.device) -> Hadamard:
        up1, down1, up2, down2 = (_float(tensor, device) for tensor in self.tensors)
        return Hadamard(up1, down1, up2, down2, self.scale)

    def take(self, rows: slice) -> Hadamard:
        return replace(self, up1=self.up1[rows], up2=self.up2[rows])

    def columns(self, columns: slice) -> Hadamard:
        return replace(self, down1=self.down1[:, columns], down2=self.down2[:, columns])

    def add_(self, total: Tensor, base: Tensor, rows: slice, strength: float) -> None:
        first, second = float32_product(self.up1[rows], self.down1), float32_product(self.up2[rows], self.down2)
        total.addcmul_(first, second, value=strength * self.scale)


@dataclass(frozen=True)
class Kronecker:
    """scale · C ⊗ W: out = c_out · w_out, in = c_in · w_in.

    A factor is one matrix, or two whose product it is; products are multiplied out only where they are added, so that a
    small file cannot ask for a large matrix before its shape has been checked.
    """

    outer: tuple[Tensor, ...]  # C [c_out, c_in], the small one
    inner: tuple[Tensor, ...]  # W [w_out, w_in]
    scale: float
    rank: int  # of the factor that is a product; 0 where both are whole
    rows: range | None = None  # the share of the output rows that is meant; None: all
    inputs: range | None = None  # the same of the columns

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self._rows), len(self._columns)

    @property
    def _rows(self) -> range:
        return range(self.outer[0].shape[0] * self.inner[0].shape[0]) if self.rows is None else self.rows

    @property
    def _columns(self) -> range:
        return range(self.outer[-1].shape[1] * self.inner[-1].shape[1]) if self.inputs is None else self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.outer, *self.inner

    merge_only = "LoKr, a Kronecker product"
    reads_base = False

    @property
    def bound(self) -> float:
        return abs(self.scale) * _bound_of_product(*self.outer) * _bound_of_product(*self.inner)

    def on(self, device: torch.device) -> Kronecker:
        return replace(self, outer=(_product(self.outer, device),), inner=(_product(self.inner, device),))

    def take(self, rows: slice) -> Kronecker:
        return replace(self, rows=self._rows[rows])

    def columns(self, columns: slice) -> Kronecker:
        return replace(self, inputs=self._columns[columns])

    def add_(self, total: Tensor, base: Tensor, rows: slice, strength: float) -> None:
        (outer,), (inner,) = self.outer, self.inner
        # The blocks of C that these rows and columns need.
        (top, bottom, skipped), (left, right, indent) = (
            _blocks(wanted, size) for wanted, size in ((self._rows[rows], len(inner)), (self._columns, inner.shape[1]))
        )
        product = torch.kron(outer[top:bottom, left:right], inner)
        product = product[skipped : skipped + len(total), indent : indent + total.shape[1]]
        total.add_(product, alpha=strength * self.scale)


@dataclass(frozen=True)
class Decomposed:
    """m · V / ‖V‖ - W0 with V = W0 + inner Δ; the norm runs along each output row.

    Strengths other than 1 scale the difference from W0.
    """

    inner: Update
    magnitude: Tensor  # m [out]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.inner.tensors, self.magnitude

    merge_only = "DoRA, which rescales whole rows of the weight"
    reads_base = True

    @property
    def bound(self) -> float:
        return _largest(self.magnitude) + self.inner.bound  # of the direction, before it is rescaled

    def on(self, device: torch.device) -> Decomposed:
        return Decomposed(self.inner.on(device), _float(self.magnitude, device))

    def take(self, rows: slice) -> Decomposed:
        return Decomposed(self.inner.take(rows), self.magnitude[rows])

    def columns(self, columns: slice) -> Decomposed:
        raise AssertionError("the norm runs along whole rows: merge.write cuts the result, not the update")

    def add_(self, total: Tensor, base: Tensor, rows: slice, strength: float) -> None:
        direction = base.clone()
        self.inner.add_(direction, base, rows, 1.0)
        norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True) + NORM_EPS
        direction.mul_(self.magnitude[rows, None] / norm).sub_(base)
        total.add_(direction, alpha=strength)


def _blocks(wanted: range, size: int) -> tuple[int, int, int]:
    """First block of `size` that holds one of `wanted`, one past the last, and where `wanted` begins in the first."""
    first = wanted[0] // size
    return first, wanted[-1] // size + 1, wanted[0] - first * size


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _bound_of_product(*factors: Tensor) -> float:
    """Of |A|, or of |A·B|."""
    inner = factors[0].shape[1] if len(factors) == 2 else 1
    return inner * math.prod(_largest(factor) for factor in factors)


def _float(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, torch.float32)


def _product(factors: tuple[Tensor, ...], device: torch.device) -> Tensor:
    if len(factors) == 1:
        return _float(factors[0], device)
    return float32_product(_float(factors[0], device), _float(factors[1], device))
