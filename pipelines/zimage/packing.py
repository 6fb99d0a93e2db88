"""How a batch of rows becomes packed sequences: patches, positions, and who is joined with whom.

A row under guidance has two joint sequences (prompt and negative prompt) that share one image sequence as long as
their captions are padded to the same length, because image positions start after the caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from multimodal_gen.attention.segments import Segments
from multimodal_gen.nn.rope import axis_turns
from multimodal_gen.pipelines.contract import CacheUse
from multimodal_gen.pipelines.stages.byte_cache import ByteCache

MULTIPLE = 32
TABLE_BYTES = 64 << 20


def pad_count(length: int) -> int:
    """Pad tokens that bring a sequence to the next multiple of 32."""
    return -length % MULTIPLE


def patchify(latents: Tensor, size: int) -> Tensor:
    """[C, h, w] → [h/p · w/p, p · p · C], channels innermost."""
    channels, height, width = latents.shape
    grid = latents.view(channels, height // size, size, width // size, size)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, size * size * channels)


def unpatchify(patches: Tensor, height: int, width: int, size: int) -> Tensor:
    """[h/p · w/p, p · p · C] → [C, h, w]."""
    grid = patches.view(height // size, width // size, size, size, -1)
    return grid.permute(4, 0, 2, 1, 3).reshape(-1, height, width)


class Rope:
    """The model's rotary axes; makes and keeps position tables on the CPU."""

    def __init__(self, axes: tuple[int, ...], theta: float) -> None:
        self.axes, self.theta = axes, theta
        self._tables: ByteCache[Tensor] = ByteCache(TABLE_BYTES, CacheUse())

    def caption(self, length: int) -> Tensor:
        """float32 [length, 2, d/2]: positions (1 … length, 0, 0), pads counted."""
        return self._tables.get(("caption", length), lambda: self._caption(length))

    def image(self, height: int, width: int, caption_length: int) -> Tensor:
        """float32 [padded tokens, 2, d/2]: (caption_length + 1, y, x); pads sit at (0, 0, 0)."""
        key = ("image", height, width, caption_length)
        return self._tables.get(key, lambda: self._image(height, width, caption_length))

    def _caption(self, length: int) -> Tensor:
        positions = torch.zeros(length, 3, dtype=torch.long)
        positions[:, 0] = torch.arange(1, length + 1)
        return axis_turns(positions, self.axes, self.theta)

    def _image(self, height: int, width: int, caption_length: int) -> Tensor:
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack([torch.full_like(y, caption_length + 1), y, x], dim=-1).flatten(0, 1)
        pads = torch.zeros(pad_count(len(grid)), 3, dtype=torch.long)
        return axis_turns(torch.cat([grid, pads]), self.axes, self.theta)


@dataclass(frozen=True, order=True)
class Shape:
    """What the layout needs to know of one row."""

    height: int  # patches
    width: int  # patches
    captions: tuple[int, ...]  # padded caption length per guidance branch


@dataclass(frozen=True)
class Joint:
    """One [image, caption] sequence."""

    row: int
    branch: int
    image: int  # index of its image sequence
    image_tokens: int  # without pads
    length: int  # of the whole sequence


@dataclass(frozen=True)
class Layout:
    """A packed batch. Sequences are sorted by length, so that equal ones stand together."""

    images: tuple[tuple[int, int, int], ...]  # per image sequence: row, patches, padded length
    joints: tuple[Joint, ...]
    image_turns: Tensor  # float32 [T_image, 2, d/2]
    joint_turns: Tensor  # float32 [T_joint, 2, d/2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.image_turns.nbytes + self.joint_turns.nbytes

    @cached_property
    def image_rows(self) -> list[int]:
        """Row of each image sequence."""
        return [row for row, _, _ in self.images]

    @cached_property
    def image_lengths(self) -> list[int]:
        """Patches of each image sequence, pads left out."""
        return [patches for _, patches, _ in self.images]

    @cached_property
    def image_segments(self) -> Segments:
        """Image sequences, pads included."""
        return Segments.of([padded for _, _, padded in self.images])

    @cached_property
    def joint_segments(self) -> Segments:
        """Joint sequences."""
        return Segments.of([joint.length for joint in self.joints])


def make_layout(shapes: Sequence[Shape], rope: Rope, device: torch.device) -> Layout:
    """Pack rows of these shapes."""
    wanted = sorted(
        {(s.height * s.width, row, caption) for row, s in enumerate(shapes) for caption in s.captions},
    )
    place = {(row, caption): i for i, (_, row, caption) in enumerate(wanted)}
    images = tuple((row, patches, patches + pad_count(patches)) for patches, row, _ in wanted)
    joints = sorted(
        (
            Joint(row, branch, place[row, caption], s.height * s.width, images[place[row, caption]][2] + caption)
            for row, s in enumerate(shapes)
            for branch, caption in enumerate(s.captions)
        ),
        key=lambda joint: (joint.length, joint.row, joint.branch),
    )
    tables = [rope.image(shapes[row].height, shapes[row].width, caption) for _, row, caption in wanted]
    captions = [rope.caption(shapes[joint.row].captions[joint.branch]) for joint in joints]
    joint_tables = [t for joint, c in zip(joints, captions, strict=True) for t in (tables[joint.image], c)]
    return Layout(
        images=images,
        joints=tuple(joints),
        image_turns=torch.cat(tables).to(device),
        joint_turns=torch.cat(joint_tables).to(device),
    )
