"""Where checkpoint tensors go inside a layer that stores several of them together."""

from __future__ import annotations

from torch import Tensor, nn


class Slotted(nn.Module):
    """A layer whose `weight` is filled through views, one per part; the parts together cover what is ever read."""

    part_names: tuple[str | None, ...] = (None,)

    def slot(self, part: str | None) -> Tensor:
        """The view of the weight that the checkpoint tensor of `part` fills."""
        raise AssertionError("every Slotted layer defines slot()")
