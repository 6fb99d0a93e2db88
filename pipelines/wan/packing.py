"""How a batch of videos becomes packed sequences: patches, positions, and which tokens share a timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from multimodal_gen.attention.segments import Segments
from multimodal_gen.nn.rope import axis_turns
from multimodal_gen.parallel.sequence import LocalSegments, TokenShards
from multimodal_gen.pipelines.contract import CacheUse
from multimodal_gen.pipelines.stages.byte_cache import ByteCache
from multimodal_gen.pipelines.wan.config import WanConfig

ROPE_THETA = 10_000.0
TABLE_BYTES = 256 << 20


def patchify(latents: Tensor, size: tuple[int, int, int]) -> Tensor:
    """[C, F, h, w] → [F/pf · h/ph · w/pw, C · pf · ph · pw], channels outermost, as a convolution's weight has them."""
    channels, frames, height, width = latents.shape
    pf, ph, pw = size
    grid = latents.reshape(channels, frames // pf, pf, height // ph, ph, width // pw, pw)
    return grid.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, channels * pf * ph * pw)


def unpatchify(patches: Tensor, shape: Shape, size: tuple[int, int, int]) -> Tensor:
    """[F · h · w of the grid, pf · ph · pw · C] → latents [C, F, h, w]: channels innermost on this side."""
    pf, ph, pw = size
    grid = patches.view(shape.frames, shape.height, shape.width, pf, ph, pw, -1)
    whole = grid.permute(6, 0, 3, 1, 4, 2, 5)
    return whole.reshape(-1, shape.frames * pf, shape.height * ph, shape.width * pw)


@dataclass(frozen=True)
class Shape:
    """What the layout needs to know of one row; numbers of patches."""

    frames: int
    height: int
    width: int
    still: int = 0  # tokens at the beginning that are clean already: their timestep is 0

    @property
    def tokens(self) -> int:
        """Patches of the whole video."""
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Stream:
    """One video under one prompt: a packed sequence."""

    row: int
    branch: int
    tokens: int
    still: int


@dataclass(frozen=True)
class Layout:
    """A packed batch. Sequences are sorted by length, so that equal ones stand together."""

    sequences: tuple[Stream, ...]
    turns: Tensor  # float32 [T, 2, d/2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.turns.nbytes

    @cached_property
    def segments(self) -> Segments:
        """Who attends to whom."""
        return Segments.of([s.tokens for s in self.sequences])

    @cached_property
    def pieces(self) -> tuple[tuple[int, int, bool], ...]:
        """Neighbouring tokens of one timestep: sequence, tokens, whether they are still."""
        found = []
        for index, s in enumerate(self.sequences):
            found += [(index, s.still, True)] if s.still else []
            found += [(index, s.tokens - s.still, False)] if s.tokens > s.still else []
        return tuple(found)

    @cached_property
    def times(self) -> Segments:
        """The pieces, as segments."""
        return Segments.of([tokens for _, tokens, _ in self.pieces])


@dataclass(frozen=True)
class Slice:
    """One rank's share of a packed batch."""

    segments: LocalSegments  # of sequences
    times: LocalSegments  # of pieces with one timestep
    turns: Tensor  # float32 [n, 2, d/2]

    @classmethod
    def of(cls, layout: Layout, shards: TokenShards) -> Slice:
        """The share of this rank."""
        return cls(shards.local(layout.segments), shards.local(layout.times), shards.split(layout.turns))


class Rope:
    """The model's rotary axes; makes and keeps position tables on the CPU."""

    def __init__(self, config: WanConfig) -> None:
        self.axes = config.rope_axes
        self._tables: ByteCache[Tensor] = ByteCache(TABLE_BYTES, CacheUse())

    def table(self, shape: Shape) -> Tensor:
        """float32 [tokens, 2, d/2] of the positions (frame, row, column)."""
        key = (shape.frames, shape.height, shape.width)
        return self._tables.get(key, lambda: self._table(*key))

    def _table(self, frames: int, height: int, width: int) -> Tensor:
        grid = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
        positions = torch.stack(grid, dim=-1).flatten(0, 2)
        return axis_turns(positions, self.axes, ROPE_THETA, angles_in=torch.float64)


def make_layout(wanted: Sequence[tuple[Shape, int, int]], rope: Rope, device: torch.device) -> Layout:
    """Pack (shape, row, guidance branch) into one batch."""
    ordered = sorted(wanted, key=lambda item: (item[0].tokens, *item[1:]))
    sequences = tuple(Stream(row, branch, shape.tokens, shape.still) for shape, row, branch in ordered)
    return Layout(sequences, torch.cat([rope.table(shape) for shape, _, _ in ordered]).to(device))
