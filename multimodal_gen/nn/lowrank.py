"""Low-rank updates of linear layers beside their weights (LoRA: Hu et al., 2021), different ones per packed sequence.

An ordered list of adapters is one wider adapter: ranks are stacked, A* = [A_1; …; A_n] and B* = [s_1·B_1, …, s_n·B_n]
with every scale and strength inside B*. An `Overlay` holds what one list does to a module tree; a `Routing` says which
tokens of a packed batch belong to which overlay, so rows with different lists share a forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from torch import Tensor, nn

from multimodal_gen.kernels.eager import eager_break
from multimodal_gen.nn.precision import compute_dtype


@dataclass(frozen=True)
class Piece:
    """The share of one part of a fused layer."""

    rows: slice  # of the layer's output
    ranks: slice  # of the stacked ranks
    up: Tensor  # B*ᵀ of this part, [ranks, rows]


@dataclass(frozen=True)
class Update:
    """What a list of adapters adds to one layer."""

    down: Tensor  # A*ᵀ [in as stored, R]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.down.nbytes + sum(piece.up.nbytes for piece in self.pieces)

    def add_(self, x: Tensor, y: Tensor) -> None:
        """y [t, out] += x [t, in] · A*ᵀ · B*ᵀ."""
        dtype = compute_dtype(x.dtype, x.device)
        hidden = x.to(dtype) @ self.down  # [t, R]
        for piece in self.pieces:
            part, h = y[:, piece.rows], hidden[:, piece.ranks]
            if dtype == y.dtype:
                part.addmm_(h, piece.up)
            else:
                part += (h @ piece.up).to(y.dtype)


@dataclass(frozen=True, eq=False)
class Overlay:
    """What one ordered list of adapters does to a module tree, unmerged."""

    updates: Mapping[nn.Module, Update]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(update.nbytes for update in self.updates.values())


class Routed(Protocol):
    """Which tokens of a packed batch use which overlay, in one form or another."""

    def add_(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Add each token's update of `layer` to y [T, out], given the layer's input x [T, in]; returns y."""


@dataclass(frozen=True)
class Routing:
    """Which tokens of a packed batch use which overlay; tokens outside every run use the weights alone."""

    runs: tuple[tuple[int, int, Overlay], ...]  # first token, one past the last, overlay

    @classmethod
    def of(cls, lengths: Sequence[int], overlays: Sequence[Overlay | None]) -> Routing | None:
        """Sequences of these lengths, each with its overlay; None where no sequence has one."""
        runs, start = [], 0
        pairs = zip(lengths, overlays, strict=True)
        for _, group in groupby(pairs, key=lambda pair: id(pair[1])):
            members = list(group)
            stop = start + sum(length for length, _ in members)
            overlay = members[0][1]
            if overlay is not None and stop > start:
                runs.append((start, stop, overlay))
            start = stop
        return cls(tuple(runs)) if runs else None

    @eager_break
    def add_(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Add each run's update of `layer` to y [T, out], given the layer's input x [T, in]; returns y."""
        for start, stop, overlay in self.runs:
            update = overlay.updates.get(layer)
            if update is not None:
                update.add_(x[start:stop], y[start:stop])
        return y
