"""Where checkpoint tensors go inside a layer that stores several of them together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Extent(NamedTuple):
    """A block of a layer's weight."""

    rows: slice
    columns: slice


class Slotted(nn.Module):
    """A layer whose `weight` is filled through blocks, one per part; together they cover what is ever read."""

    weight: nn.Parameter
    part_names: tuple[str | None, ...] = (None,)

    def extent(self, part: str | None) -> Extent:
        """The block of the weight that the checkpoint tensor of `part` fills."""
        raise AssertionError("every Slotted layer defines extent()")

    def slot(self, part: str | None) -> Tensor:
        """The view of that block, in the shape of the checkpoint's tensor."""
        rows, columns = self.extent(part)
        return self.weight[rows, columns]

    def bias_slot(self, part: str | None) -> Tensor:
        """The same of the bias, for layers that have one: [rows]."""
        return self.get_parameter("bias")[self.extent(part).rows]
