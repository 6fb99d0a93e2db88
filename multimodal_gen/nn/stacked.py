"""Several overlays side by side, for batches of few tokens: one operation per layer, however many there are.

A run of tokens costs two products and more for each overlay, which is right for long prompts. Where every token is of
another sequence, most of the time would go into calls: `kernels/grouped_lora.py` computes each token's own update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from multimodal_gen.kernels.grouped_lora import grouped_lora_
from multimodal_gen.nn.lowrank import Overlay, Update


@dataclass(frozen=True)
class StackedUpdate:
    """What all overlays of a stack do to one layer."""

    down: Tensor  # [in as stored, ΣR]
    up: Tensor  # [ΣR, out as stored]; zero where an overlay leaves a part alone
    starts: Tensor  # int32 [overlays + 1]: the first of the ranks of each, and one past the last


@dataclass(frozen=True)
class Stack:
    """Overlays in an order, and their updates side by side."""

    overlays: tuple[Overlay, ...]
    updates: Mapping[nn.Module, StackedUpdate]

    @classmethod
    def of(cls, overlays: Sequence[Overlay]) -> Stack:
        """A copy of them, side by side."""
        layers = dict.fromkeys(layer for overlay in overlays for layer in overlay.updates)
        return cls(tuple(overlays), {layer: _beside(layer, overlays) for layer in layers})

    @property
    def nbytes(self) -> int:
        """Bytes held, besides the overlays themselves."""
        return sum(update.down.nbytes + update.up.nbytes for update in self.updates.values())


def _beside(layer: nn.Module, overlays: Sequence[Overlay]) -> StackedUpdate:
    found = [overlay.updates.get(layer) for overlay in overlays]
    present = [update for update in found if update is not None]
    out = layer.get_parameter("weight").shape[0]
    down = torch.cat([update.down for update in present], dim=1)
    widths = [0 if update is None else update.down.shape[1] for update in found]
    starts = torch.tensor([0, *accumulate(widths)], dtype=torch.int32, device=down.device)
    up = torch.cat([_whole(update, out) for update in present])
    return StackedUpdate(down, up, starts)


def _whole(update: Update, out: int) -> Tensor:
    """B*ᵀ of all parts, [R, out]."""
    up = update.down.new_zeros(update.down.shape[1], out)
    for piece in update.pieces:
        up[piece.ranks, piece.rows] = piece.up
    return up


@dataclass(frozen=True)
class StackedRouting:
    """Which overlay of a stack each token of a batch uses. Takes the place of `lowrank.Routing`."""

    stack: Stack
    owners: Tensor  # int32 [T]: place in the stack; -1: the weights alone

    def add_(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Add each token's update of `layer` to y [T, out], given the layer's input x [T, in]; returns y."""
        update = self.stack.updates.get(layer)
        return y if update is None else grouped_lora_(y, x, update.down, update.up, update.starts, self.owners)
