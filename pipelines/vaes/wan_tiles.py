"""The widest part of Wan's decoder, tile by tile, to the same numbers as at once.

All that happens at an eighth and a quarter of the size, attention included, happens once, for whole frames. What comes
after sees a few pixels around each one only, so a tile that is so much larger on all sides makes the same pixels; the
rim is thrown away. Every tile has a past of its own. Ranks share the tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal_gen.parallel.group import Group
from multimodal_gen.pipelines.vaes.tiles import decode_shared
from multimodal_gen.pipelines.vaes.wan_layers import Past

SIDE = 128  # of a tile, in pixels of what the tiled part reads: half the decoder's
GRID = 4  # tiles begin at multiples, as the tiles of the convolutions do (kernels/conv3x3.py)


@dataclass(frozen=True)
class Tile:
    """A piece of the frames: what is read, and what is kept of what comes out, in pixels of what is read."""

    rows: slice
    columns: slice
    kept_rows: slice  # counted from the first of `rows`
    kept_columns: slice

    def of(self, x: Tensor) -> Tensor:
        """[F, H, W, C] → what is read of it."""
        return x[:, self.rows, self.columns].contiguous()

    def kept(self, y: Tensor, times: int) -> Tensor:
        """[F, times · h, times · w, C] → what is kept of it."""
        rows, columns = (slice(times * s.start, times * s.stop) for s in (self.kept_rows, self.kept_columns))
        return y[:, rows, columns].contiguous()


def cut(height: int, width: int, rim: int) -> list[list[Tile]]:
    """Rows of tiles of a frame of this size; each sees `rim` pixels more on all sides, where there are any."""
    rim = -(-rim // GRID) * GRID
    return [[Tile(r, c, kr, kc) for c, kc in _spans(width, rim)] for r, kr in _spans(height, rim)]


def _spans(length: int, rim: int) -> list[tuple[slice, slice]]:
    count = max(1, round(length / SIDE))
    step = -(-length // count // GRID) * GRID
    spans = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        begin = max(0, start - rim)
        spans.append((slice(begin, min(length, stop + rim)), slice(start - begin, stop - begin)))
    return spans


class Tiled:
    """The tiled part for one video."""

    def __init__(self, compute: Callable[[Tensor, Past], Tensor], rim: int, past: Past, group: Group) -> None:
        """
        Args:
            compute: [F, H, W, C] → [F', 2H, 2W, out].
            rim: how far it sees, in pixels of what it reads.
            past: whose filters, and nothing else, all tiles share.
            group: of ranks that share the tiles.
        """
        self._compute, self._rim, self._group = compute, rim, group
        self._past = past
        self._pasts: dict[int, Past] = {}  # tile → its own; only of this rank's tiles

    def __call__(self, x: Tensor) -> Tensor:
        """The next frames of the video: [F, H, W, C] → [F', 2H, 2W, out]."""
        lines = cut(x.shape[1], x.shape[2], self._rim)
        tiles = [tile for line in lines for tile in line]
        decoded = decode_shared(range(len(tiles)), lambda i: self._tile(x, i, tiles[i]), self._group, x)
        width = len(lines[0])
        return torch.cat([torch.cat(decoded[i : i + width], dim=2) for i in range(0, len(decoded), width)], dim=1)

    def _tile(self, x: Tensor, index: int, tile: Tile) -> Tensor:
        past = self._pasts.setdefault(index, Past(self._past.again, filters=self._past.filters))
        y = self._compute(tile.of(x), past)
        return tile.kept(y, 2)
