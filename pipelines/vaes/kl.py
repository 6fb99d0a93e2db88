"""AutoencoderKL through diffusers, loaded by our loader and laid out for the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.errors import Overflowed
from multimodal_gen.memory.residency import Memory
from multimodal_gen.nn.precision import compute_dtype
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.pipelines.stages.working import IMAGE_VAE_PER_PIXEL, OVERHEAD
from multimodal_gen.pipelines.vaes.tiles import Tiling
from multimodal_gen.weights.checkpoint import read_json
from multimodal_gen.weights.loading import WeightTree, construction


class KLDecoder:
    """Latents → pixels, one image at a time: convolutions gain nothing from a batch and a row stays on its own."""

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
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        config = read_json(folder, "config.json")
        self.device, self.dtype = device, compute_dtype(dtype, device)
        with construction(torch.device("meta"), self.dtype):  # no time spent on random initial weights
            vae = AutoencoderKL.from_config({k: v for k, v in config.items() if not k.startswith("_")})
        # Channels-last convolutions are never slower here and ten times faster for bf16 on a CPU.
        self.vae = vae.eval().to(memory_format=torch.channels_last)
        self._here = memory.add("vae", "decode", self.vae, WeightTree(self.vae, files))
        self.scale: float = vae.config["scaling_factor"]
        self.shift: float = vae.config["shift_factor"] or 0.0
        self.tiling = Tiling(vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor)
        self.tile: int = vae.tile_sample_min_size
        self.tiled, self.group = tiled, group
        self.parameters = sum(p.numel() for p in vae.parameters())

    def working(self, width: int, height: int) -> int:
        """Bytes that decoding a picture of this size needs beside the weights."""
        pixels = min(width * height, self.tile**2) if self.tiled else width * height
        return OVERHEAD + pixels * IMAGE_VAE_PER_PIXEL * self.dtype.itemsize

    def decode(self, latents: Tensor) -> np.ndarray:
        """float32 [C, h, w] → uint8 [H, W, 3]. Raises: Overflowed for latents that overflowed."""
        if not torch.isfinite(latents).all():
            raise Overflowed(
                "The model's numbers overflowed; run it with --dtype bfloat16 or float32, or lower the strengths "
                "of its adapters."
            )
        z = latents.to(self.device, self.dtype)[None] / self.scale + self.shift
        tiled = self.tiled and self.tiling.applies(z)
        with self._here():
            whole = self.tiling.decode(z, self._decode, self.group) if tiled else self._decode(z)
        pixels = (whole[0].float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0)
        return (pixels * 255).round().to(torch.uint8).cpu().numpy()

    def _decode(self, z: Tensor) -> Tensor:
        """[1, C, h, w] → [1, 3, H, W]."""
        pixels: Tensor = self.vae.decode(z.contiguous(memory_format=torch.channels_last), return_dict=False)[0]
        return pixels
