"""Linear layers: plain, and several projections of the same input fused into one matrix product.

A layer tells the loader where a checkpoint tensor goes through `extent(part)`. Families name the parts in their rename
table; nobody concatenates weights after loading. Inputs are [T, in] where adapters are routed, else [..., in].

Several ranks can share a layer (Shoeybi et al., 2019): by columns of the output, each rank with its own outputs (of
every part), or by rows of the input, where each rank adds its inputs' share and the sums are all-reduced.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.nn.lowrank import Routed
from multimodal_gen.nn.precision import compute_dtype
from multimodal_gen.nn.slots import Cut, Extent, How, Slotted, hollow, share
from multimodal_gen.parallel.group import SOLO, Group


def align(size: int, multiple: int = 16) -> int:
    """`size` rounded up. Matrix products with odd widths run at two thirds of the speed of aligned ones."""
    return -(-size // multiple) * multiple


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] · weightᵀ [in, out] + bias, in the dtype of x; multiplied in float32 where bf16 is only emulated."""
    dtype = compute_dtype(x.dtype, x.device)
    if dtype == x.dtype:
        return F.linear(x, weight, bias)
    wide = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return wide.to(x.dtype)


def _weight(rows: int, columns: int, *, padded: bool, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Memory that the loader fills; zeros where it leaves padding."""
    make = torch.zeros if padded else torch.empty
    return nn.Parameter(make(rows, columns, dtype=dtype), requires_grad=False)


class Packed(Protocol):
    """A layer's weight in another form: in an order that the processor likes, or in fewer bits."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in as stored] → a new tensor [T, out] in the dtype of x."""


class Linear(Slotted):
    """y [..., out] = x [..., in] · Wᵀ + b.

    `stored_in` > `in_features` keeps zero columns at the end of W: the input comes from an aligned layer. `dtype` is
    for layers that stay in another than the model's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        stored_in: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.aligned = stored_in is not None
        self.group = SOLO  # the ranks whose outputs add up; filled by shard_
        self.packed: Packed | None = None  # computed with instead of the weight; filled by whoever packed it
        padded = stored_in not in (None, in_features)
        self.weight = _weight(out_features, stored_in or in_features, padded=padded, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    def extent(self, part: str | None) -> Extent:
        """Where the checkpoint's [out, in] stands in the weight."""
        assert part is None, f"a plain Linear has no part {part!r}"
        return Extent(slice(0, len(self.weight)), slice(0, self.in_features))

    def shard_(self, how: How, group: Group, name: str) -> None:
        """Raises: ConfigError."""
        rows, stored = self.weight.shape
        if how == "column":
            rows = share(rows, group, name)
            self.cuts = {parameter: Cut(0, group.rank, group.size) for parameter in ("weight", "bias")}
            self.bias = None if self.bias is None else hollow((rows,), self.bias)
        else:
            assert how == "row", f"{name}: a linear layer is shared out by column or row, not by {how}"
            self.in_features = stored = share(self.in_features, group, name)
            stored = align(stored) if self.aligned else stored
            self.cuts, self.group = {"weight": Cut(1, group.rank, group.size)}, group
        self.weight = hollow((rows, stored), self.weight)

    def forward(self, x: Tensor, routing: Routed | None = None) -> Tensor:
        alone = self.group.size == 1
        bias = self.bias if alone else None
        y = linear(x, self.weight, bias) if self.packed is None else self.packed(x, bias)
        if routing is not None:
            routing.add_(self, x, y)
        if alone:
            return y
        self.group.all_reduce_(y)
        return y if self.bias is None else y.add_(self.bias)


class PatchEmbedding(Linear):
    """A convolution whose stride is its kernel, as the linear layer of patches that it is.

    The checkpoint's weight is [out, channels, *kernel]; patches hold their channels outermost.
    """

    def __init__(self, channels: int, kernel: tuple[int, ...], out_features: int) -> None:
        super().__init__(channels * math.prod(kernel), out_features, bias=True)
        self.shape = (channels, *kernel)

    def slot(self, part: str | None) -> Tensor:
        """The weight in the checkpoint's shape."""
        return super().slot(part).unflatten(1, self.shape)


class FusedLinear(Slotted):
    """Several projections of one input as one product; each part's rows start at an aligned offset.

    y [..., Σ stored(part)]; rows between a part's size and its aligned size are zero.
    """

    def __init__(self, in_features: int, parts: dict[str, int], multiple: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.part_names = tuple(parts)
        self.sizes = tuple(parts.values())
        self.multiple = multiple
        self.stored = [align(size, multiple) for size in parts.values()]
        self.packed: Packed | None = None  # as of Linear
        padded = tuple(self.stored) != self.sizes
        assert not (bias and padded), "no layer has needed both"
        self.weight = _weight(sum(self.stored), in_features, padded=padded)
        self.bias = nn.Parameter(torch.empty(sum(self.stored)), requires_grad=False) if bias else None

    def extent(self, part: str | None) -> Extent:
        """Where the checkpoint's [size(part), in] stands in the weight."""
        index = self.part_names.index(part)
        start = sum(self.stored[:index])
        return Extent(slice(start, start + self.sizes[index]), slice(0, self.weight.shape[1]))

    def shard_(self, how: How, group: Group, name: str) -> None:
        """Every part by columns. Raises: ConfigError."""
        assert how == "column", f"{name}: fused layers are shared out by column, not by {how}"
        self.sizes = tuple(share(size, group, name) for size in self.sizes)
        self.stored = [align(size, self.multiple) for size in self.sizes]
        self.cuts = {parameter: Cut(0, group.rank, group.size) for parameter in ("weight", "bias")}
        self.weight = hollow((sum(self.stored), self.weight.shape[1]), self.weight)
        self.bias = None if self.bias is None else hollow((sum(self.stored),), self.bias)

    def forward(self, x: Tensor, routing: Routed | None = None) -> Tensor:
        y = linear(x, self.weight, self.bias) if self.packed is None else self.packed(x, self.bias)
        return y if routing is None else routing.add_(self, x, y)
