"""Where checkpoint tensors go inside a layer that stores several of them together, or only a share of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from multimodal_gen.errors import ConfigError
from multimodal_gen.parallel.group import Group

How = Literal["column", "row", "heads"]


class Extent(NamedTuple):
    """A block of a layer's weight."""

    rows: slice
    columns: slice


@dataclass(frozen=True)
class Cut:
    """Which of `count` equal pieces of a checkpoint's tensor is held, along one of its dimensions."""

    dim: int
    index: int
    count: int

    def whole(self, share: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole tensor, from that of the piece."""
        return (*share[: self.dim], share[self.dim] * self.count, *share[self.dim + 1 :])

    def share(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the piece, from that of the whole tensor."""
        return (*whole[: self.dim], whole[self.dim] // self.count, *whole[self.dim + 1 :])

    def piece(self, size: int) -> slice:
        """The piece along `dim`, which is `size` long in the whole tensor."""
        share = size // self.count
        return slice(self.index * share, (self.index + 1) * share)

    def index_of(self, whole: tuple[int, ...]) -> tuple[slice, ...]:
        """The index that takes the piece out of a tensor of this shape."""
        return (*(slice(0, size) for size in whole[: self.dim]), self.piece(whole[self.dim]))


class Slotted(nn.Module):
    """A layer whose `weight` is filled through blocks, one per part; together they cover what is ever read."""

    weight: nn.Parameter
    part_names: tuple[str | None, ...] = (None,)

    def __init__(self) -> None:
        super().__init__()
        self.cuts: dict[str, Cut] = {}  # parameter → what of its checkpoint tensors is held here; filled by shard_

    def extent(self, part: str | None) -> Extent:
        """The block of the weight that the checkpoint tensor of `part` fills."""
        raise AssertionError("every Slotted layer defines extent()")

    def slot(self, part: str | None) -> Tensor:
        """The view of that block, in the shape of the checkpoint's tensor (or of this rank's share of it)."""
        rows, columns = self.extent(part)
        return self.weight[rows, columns]

    def bias_slot(self, part: str | None) -> Tensor:
        """The same of the bias, for layers that have one: [rows]."""
        return self.get_parameter("bias")[self.extent(part).rows]

    def padding(self) -> list[Tensor]:
        """The views of the weight that no part fills; they must be zero."""
        extents = sorted((self.extent(part) for part in self.part_names), key=lambda extent: extent.rows.start)
        found, start = [], 0
        for extent in extents:
            found.append(self.weight[start : extent.rows.start])
            start = extent.rows.stop
        found += [self.weight[start:], self.weight[:, max(extent.columns.stop for extent in extents) :]]
        return [view for view in found if view.numel()]

    def cut(self, parameter: str, part: str | None) -> Cut | None:
        """What of the checkpoint's tensor of `part` is held here; None: all of it."""
        return self.cuts.get(parameter)

    def shard_(self, how: How, group: Group, name: str) -> None:
        """Keep this rank's share only; the layer is still on the meta device.

        Args:
            name: of the layer, for messages.

        Raises: ConfigError for a width that the ranks cannot share.
        """
        raise AssertionError(f"{name}: {type(self).__name__} cannot be shared out by {how}")


def share(size: int, group: Group, name: str) -> int:
    """An equal share of `size`. Raises: ConfigError naming both numbers."""
    if size % group.size:
        raise ConfigError(
            f"{name}: a width of {size} cannot be shared out equally over --tp-size {group.size} ranks.",
            param="tp_size",
        )
    return size // group.size


def hollow(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
    """A parameter without memory yet."""
    assert like.is_meta, "a layer is shared out before it has memory"
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta"), requires_grad=False)
