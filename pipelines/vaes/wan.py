"""AutoencoderKLWan through diffusers: videos to latents and back, frame by frame with a causal cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.errors import CorruptModel, Overflowed
from multimodal_gen.memory.residency import Memory
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.pipelines.stages.working import OVERHEAD, VIDEO_VAE_PER_PIXEL
from multimodal_gen.pipelines.vaes.tiles import Tiling
from multimodal_gen.weights.checkpoint import read_json
from multimodal_gen.weights.loading import WeightTree, construction

TILE = 256  # pixels of a side
OVERLAP = 0.25


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
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, unpatchify

        config = read_json(folder, "config.json")
        self.device = device
        with construction(torch.device("meta"), torch.float32):  # no time spent on random initial weights
            vae = AutoencoderKLWan.from_config({k: v for k, v in config.items() if not k.startswith("_")})
        self.vae = vae.eval()
        self._here = memory.add("vae", "decode", self.vae, WeightTree(self.vae, files))
        mean, std = vae.config["latents_mean"], vae.config["latents_std"]
        if not len(mean) == len(std) == vae.config["z_dim"]:
            raise CorruptModel(
                f"vae/config.json: latents_mean and latents_std must have z_dim = {vae.config['z_dim']} numbers, not "
                f"{len(mean)} and {len(std)}."
            )
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1, 1)
        self.tiling = Tiling(TILE // vae.spatial_compression_ratio, TILE, OVERLAP)
        self.tiled, self.group = tiled, group
        self._unpatchify = unpatchify
        self.parameters = sum(p.numel() for p in vae.parameters())

    def working(self, width: int, height: int) -> int:
        """Bytes that a video with frames of this size needs beside the weights."""
        pixels = min(width * height, TILE**2) if self.tiled else width * height
        return OVERHEAD + pixels * VIDEO_VAE_PER_PIXEL * torch.float32.itemsize

    def encode(self, pixels: Tensor) -> Tensor:
        """float32 [3, F, H, W] in -1 … 1 → the most likely latents [C, f, h, w], normalised."""
        with self._here():
            moments: Tensor = self.vae.encode(pixels[None].to(self.device), return_dict=False)[0].mode()
        return (moments[0] - self.mean) * (1.0 / self.std)

    def decode(self, latents: Tensor) -> np.ndarray:
        """float32 [C, f, h, w] → uint8 [F, H, W, 3]. Raises: Overflowed for latents that overflowed."""
        if not torch.isfinite(latents).all():
            raise Overflowed(
                "The model's numbers overflowed; run it with --dtype bfloat16 or float32, or lower the strengths "
                "of its adapters."
            )
        z = latents.to(self.device, torch.float32) / (1.0 / self.std) + self.mean
        tiled = self.tiled and self.tiling.applies(z)
        with self._here():
            whole = self.tiling.decode(z[None], self._decode, self.group) if tiled else self._decode(z[None])
        pixels = (whole[0] * 0.5 + 0.5).clamp_(0, 1).mul_(255).round_()
        return pixels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()

    def _decode(self, z: Tensor) -> Tensor:
        """[1, C, f, h, w] → [1, 3, F, H, W], not clamped: tiles fade into one another before that.

        diffusers' own loop appends to the video frame by frame, which copies it again and again.
        """
        vae = self.vae
        vae.clear_cache()
        z = vae.post_quant_conv(z)
        parts = []
        for index in range(z.shape[2]):
            vae._conv_idx = [0]
            latent = z[:, :, index : index + 1]
            parts.append(vae.decoder(latent, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
        vae.clear_cache()
        pixels = torch.cat(parts, dim=2)
        return pixels if vae.config["patch_size"] is None else self._unpatchify(pixels, vae.config["patch_size"])
