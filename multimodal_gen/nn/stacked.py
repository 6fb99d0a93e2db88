"""Several overlays side by side, for batches of few tokens: three operations per layer, however many there are.

A run of tokens costs two products and more for each overlay, which is right for long prompts. Where every token is of
another sequence, most of the time would go into calls. Here one product makes the hidden numbers of all overlays for
all tokens, those of other tokens' overlays become zero, and one product adds the rest (a dense relative of the kernels
of Punica: Chen et al., 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from multimodal_gen.nn.lowrank import Overlay, Update
from multimodal_gen.nn.precision import compute_dtype


@dataclass(frozen=True)
class StackedUpdate:
    """What all overlays of a stack do to one layer."""

    down: Tensor  # [in as stored, ΣR]
    up: Tensor  # [ΣR, out as stored]; zero where an overlay leaves a part alone
    widths: tuple[int, ...]  # R of each overlay
    places: Tensor  # int64 [ΣR]: whose column it is


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
    widths = tuple(0 if update is None else update.down.shape[1] for update in found)
    places = [place for place, width in enumerate(widths) for _ in range(width)]
    up = torch.cat([_whole(update, out) for update in present])
    return StackedUpdate(down, up, widths, torch.tensor(places, device=down.device))


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
    owners: Tensor  # int64 [T]: place in the stack; -1: the weights alone
    # Widths → bool [T, ΣR]: hidden numbers of others; made once per forward.
    masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def add_(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Add each token's update of `layer` to y [T, out], given the layer's input x [T, in]; returns y."""
        update = self.stack.updates.get(layer)
        if update is None:
            return y
        dtype = compute_dtype(x.dtype, x.device)
        # Not by a product: another's numbers may have overflowed.
        hidden = torch.mm(x.to(dtype), update.down).masked_fill_(self._mask(update), 0.0)
        if dtype == y.dtype:
            return y.addmm_(hidden, update.up)
        return y.add_((hidden @ update.up).to(y.dtype))

    def _mask(self, update: StackedUpdate) -> Tensor:
        if update.widths not in self.masks:
            self.masks[update.widths] = self.owners[:, None] != update.places
        return self.masks[update.widths]
