"""AutoencoderKLWan: videos to latents and back. Frames leave as they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.errors import CorruptModel, Overflowed
from multimodal_gen.memory.residency import Memory
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.pipelines.stages.working import OVERHEAD, VIDEO_VAE_PER_PIXEL
from multimodal_gen.pipelines.vaes.wan_model import RENAMES, WanModel
from multimodal_gen.weights.checkpoint import read_json
from multimodal_gen.weights.loading import WeightTree, construction


class WanVae:
    """One video at a time, in float32: an encoder in half precision shifts the picture that a video starts from."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        device: torch.device,
        memory: Memory,
        tiled: bool = False,
        group: Group = SOLO,
    ) -> None:
        """
        Args:
            folder: the vae/ folder.
            files: its weights.
            memory: gives it memory, and says when it may be used.
            tiled: decode frames that are larger than a tile by tiles.
            group: the ranks that share the tiles; all of them decode the same latents.

        Raises: CorruptModel.
        """
        config = read_json(folder, "config.json")
        self.device = device
        with construction(torch.device("meta"), torch.float32):  # no time spent on random initial weights
            self.vae = WanModel(config).eval()
        weights = WeightTree(self.vae, files, RENAMES)
        self._here = memory.add("vae", "decode", self.vae, weights)
        mean, std = config["latents_mean"], config["latents_std"]
        if not len(mean) == len(std) == config["z_dim"]:
            raise CorruptModel(
                f"vae/config.json: latents_mean and latents_std must have z_dim = {config['z_dim']} numbers, not "
                f"{len(mean)} and {len(std)}."
            )
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1, 1)
        self.tiled, self.group = tiled, group
        self.parameters = weights.parameters

    def working(self, width: int, height: int) -> int:
        """Bytes that a video with frames of this size needs beside the weights."""
        return OVERHEAD + self.vae.kept_bytes + width * height * VIDEO_VAE_PER_PIXEL * torch.float32.itemsize

    def encode(self, pixels: Tensor) -> Tensor:
        """float32 [3, F, H, W] in -1 … 1 → the most likely latents [C, f, h, w], normalised."""
        frames = pixels.to(self.device).permute(1, 2, 3, 0).contiguous()
        with self._here():
            latents: Tensor = self.vae.encode(frames)
        return (latents.permute(3, 0, 1, 2) - self.mean) * (1.0 / self.std)

    def decode(self, latents: Tensor) -> Iterator[np.ndarray | None]:
        """float32 [C, f, h, w] → uint8 [1, H, W, 3], then [4, H, W, 3] for each further latent frame.

        Raises: Overflowed for latents that overflowed.
        """
        if not torch.isfinite(latents).all():
            raise Overflowed(
                "The model's numbers overflowed; run it with --dtype bfloat16 or float32, or lower the strengths "
                "of its adapters."
            )
        z = latents.to(self.device, torch.float32) / (1.0 / self.std) + self.mean
        frames = z.permute(1, 2, 3, 0).contiguous()
        pieces = self.vae.decode(frames, self.group if self.tiled else None)
        for _ in range(len(frames)):
            with self._here():
                pixels = next(pieces)
            yield _to_255(pixels)


def _to_255(pixels: Tensor) -> np.ndarray:
    """[F, H, W, 3] in -1 … 1 → uint8."""
    levels = (pixels * 0.5 + 0.5).clamp_(0, 1).mul_(255).round_()
    return levels.to(torch.uint8).contiguous().cpu().numpy()
