"""Decoding pictures by overlapping tiles: less memory, and ranks that share the work.

It is approximate: group norms and attention see one tile at a time (tiles of videos are exact: `wan_tiles`). Which rank
decodes a tile changes nothing: shared out or not, the picture is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from multimodal_gen.parallel.group import Group

Piece = TypeVar("Piece")


def decode_shared(
    tiles: Sequence[Piece], decode: Callable[[Piece], Tensor], group: Group, like: Tensor
) -> list[Tensor]:
    """Decode tiles, each on one rank of the group; every rank gets all of them, in order.

    Args:
        tiles: the same on every rank.
        decode: one tile → its pixels.
        like: as the pixels in dtype, device and number of dimensions.

    Raises: PeerLost; what `decode` raised.
    """
    if group.size == 1:
        return [decode(tile) for tile in tiles]
    mine = {index: decode(tiles[index]) for index in range(group.rank, len(tiles), group.size)}
    shapes = torch.zeros(len(tiles), like.dim(), dtype=torch.int64, device=like.device)
    for index, pixels in mine.items():
        shapes[index] = torch.tensor(pixels.shape)
    found = [torch.Size(shape) for shape in group.all_reduce_(shapes).tolist()]
    sizes = [sum(shape.numel() for shape in found[rank :: group.size]) for rank in range(group.size)]
    flat = like.new_zeros(1, max(sizes))
    if mine:
        flat[0, : sizes[group.rank]] = torch.cat([pixels.flatten() for pixels in mine.values()])
    decoded: dict[int, Tensor] = {}
    for rank, values in enumerate(group.all_gather(flat)):
        indices = range(rank, len(tiles), group.size)
        parts = values[: sizes[rank]].split([found[index].numel() for index in indices])
        decoded.update({index: part.view(found[index]) for index, part in zip(indices, parts, strict=True)})
    return [decoded[index] for index in range(len(tiles))]


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut, as diffusers cuts them."""

    latent: int  # side of a tile, in latents
    sample: int  # the same in pixels
    overlap: float  # share of a side that neighbours have in common

    @property
    def stride(self) -> int:
        """Latents from one tile to the next."""
        return int(self.latent * (1 - self.overlap))

    @property
    def blend(self) -> int:
        """Pixels over which neighbours fade into one another."""
        return int(self.sample * self.overlap)

    def applies(self, z: Tensor) -> bool:
        """Whether latents [..., h, w] are larger than one tile."""
        return max(z.shape[-2:]) > self.latent

    def decode(self, z: Tensor, decode: Callable[[Tensor], Tensor], group: Group) -> Iterator[Tensor | None]:
        """z [..., h, w] → [..., H, W] in the end; before that nothing, tile by tile, where no ranks share them.

        Raises: as `decode_shared`.
        """
        tops, lefts = range(0, z.shape[-2], self.stride), range(0, z.shape[-1], self.stride)
        tiles = [z[..., top : top + self.latent, left : left + self.latent] for top in tops for left in lefts]
        decoded: list[Tensor] = []
        if group.size > 1:
            decoded = decode_shared(tiles, decode, group, z)
        else:
            for tile in tiles:
                decoded.append(decode(tile))
                yield None
        rows = [decoded[start : start + len(lefts)] for start in range(0, len(decoded), len(lefts))]
        kept = self.sample - self.blend
        lines = []
        for i, row in enumerate(rows):
            for j, tile in enumerate(row):
                if i > 0:
                    _fade_(rows[i - 1][j], tile, -2, self.blend)
                if j > 0:
                    _fade_(row[j - 1], tile, -1, self.blend)
            lines.append(torch.cat([tile[..., :kept, :kept] for tile in row], dim=-1))
        yield torch.cat(lines, dim=-2)


def _fade_(before: Tensor, after: Tensor, dim: int, extent: int) -> None:
    """The beginning of `after` fades in over the end of `before`, along `dim`, counted from the end."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    weights = torch.arange(extent, dtype=after.dtype, device=after.device).div_(extent)
    weights = weights.view(-1, *[1] * (-1 - dim))
    start = after.narrow(dim, 0, extent)
    start.copy_(before.narrow(dim, before.shape[dim] - extent, extent) * (1 - weights) + start * weights)
