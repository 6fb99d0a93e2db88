"""Latents to pictures: the decoder of AutoencoderKL, one picture at a time, in pieces that others can run between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.errors import CorruptModel, Overflowed
from multimodal_gen.memory.residency import Memory
from multimodal_gen.nn.precision import compute_dtype
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.pipelines.stages.working import IMAGE_VAE_PER_PIXEL, OVERHEAD
from multimodal_gen.pipelines.vaes.kl_decoder import IGNORED, KLModel
from multimodal_gen.pipelines.vaes.tiles import Tiling
from multimodal_gen.weights.checkpoint import read_json
from multimodal_gen.weights.loading import WeightTree, construction

OVERLAP = 0.25  # of neighbouring tiles, as in diffusers


class KLDecoder:
    """Latents → pixels: convolutions gain nothing from a batch, and a row stays on its own."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        device: torch.device,
        dtype: torch.dtype,
        memory: Memory,
        tiled: bool = False,
        group: Group = SOLO,
    ) -> None:
        """
        Args:
            folder: the vae/ folder.
            files: its weights.
            memory: gives it memory, and says when it may be used.
            tiled: decode what is larger than a tile by tiles.
            group: the ranks that share the tiles; all of them decode the same latents.

        Raises: CorruptModel.
        """
        config = read_json(folder, "config.json")
        self.device, self.dtype = device, compute_dtype(dtype, device)
        with construction(torch.device("meta"), self.dtype):  # no time spent on random initial weights
            self.vae = KLModel(config).eval()
        weights = WeightTree(self.vae, files, ignored=IGNORED)
        self._memory, self._here = memory, memory.add("vae", "decode", self.vae, weights)
        try:
            self.scale = float(config["scaling_factor"])
            self.shift = float(config.get("shift_factor") or 0.0)
            self.tile: int = config["sample_size"]
        except (KeyError, TypeError) as error:
            raise CorruptModel(f"vae/config.json does not describe an AutoencoderKL ({error}).") from None
        self.tiling = Tiling(self.tile >> len(config["block_out_channels"]) - 1, self.tile, OVERLAP)
        self.tiled, self.group = tiled, group
        self.parameters = weights.parameters

    def working(self, width: int, height: int) -> int:
        """Bytes that decoding a picture of this size needs beside the weights."""
        pixels = min(width * height, self.tile**2) if self.tiled else width * height
        return OVERHEAD + self.vae.kept_bytes + pixels * IMAGE_VAE_PER_PIXEL * self.dtype.itemsize

    def forget(self) -> None:
        """Let go of what is kept from one picture to the next."""
        self.vae.forget()

    def decode(self, latents: Tensor) -> Iterator[np.ndarray | None]:
        """float32 [C, h, w] → uint8 [H, W, 3] in the end; before that nothing, block by block or tile by tile.

        Raises: Overflowed for latents that overflowed.
        """
        if not torch.isfinite(latents).all():
            raise Overflowed(
                "The model's numbers overflowed; run it with --dtype bfloat16 or float32, or lower the strengths "
                "of its adapters."
            )
        z = latents.to(self.device, self.dtype) / self.scale + self.shift
        tiled = self.tiled and self.tiling.applies(z)
        pieces = self.tiling.decode(z, self._tile, self.group) if tiled else self._blocks(z)
        while True:
            with self._here():
                pixels = next(pieces)
            if pixels is not None:
                if not self._memory.stays("vae"):
                    self.forget()
                yield _to_255(pixels.permute(1, 2, 0))
                return
            yield None

    def _blocks(self, z: Tensor) -> Iterator[Tensor | None]:
        """[C, h, w] → [3, H, W] in the end."""
        blocks = self.vae.blocks(z)
        for _ in range(self.vae.count - 1):
            next(blocks)
            yield None
        yield next(blocks)[0].permute(2, 0, 1)

    def _tile(self, z: Tensor) -> Tensor:
        """[C, h, w] → [3, H, W]."""
        pixels: Tensor = self.vae(z)
        return pixels.permute(2, 0, 1)


def _to_255(pixels: Tensor) -> np.ndarray:
    """[H, W, 3] in -1 … 1 → uint8."""
    levels = (pixels.float() * 0.5 + 0.5).clamp_(0, 1).mul_(255).round_()
    return levels.to(torch.uint8).contiguous().cpu().numpy()
