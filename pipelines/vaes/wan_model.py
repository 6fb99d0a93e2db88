"""AutoencoderKLWan in channels-last order, for videos that come piece by piece. Reference: diffusers' class."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from multimodal_gen.errors import CorruptModel
from multimodal_gen.kernels.conv3x3 import filters_bytes
from multimodal_gen.parallel.group import Group
from multimodal_gen.pipelines.vaes.layers import Pointwise, expect
from multimodal_gen.pipelines.vaes.wan_layers import (
    Conv,
    Downsample,
    Middle,
    Norm,
    Past,
    Residual,
    Upsample,
    average,
    repeat,
)
from multimodal_gen.pipelines.vaes.wan_tiles import SIDE, Tiled
from multimodal_gen.weights.loading import Rename

# The checkpoint counts these convolutions as the second of two layers.
RENAMES = (Rename(r"(.*)\.resample\.1\.(\w+)", r"\1.resample.\2"),)


class Up(nn.Module):
    """Residual blocks of one size, then the way to the next."""

    def __init__(self, channels: int, out: int, layers: int, upsample: Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(out if i else channels, out) for i in range(layers))
        self.upsamplers = nn.ModuleList([] if upsample is None else [upsample])

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[F, H, W, in] → [F or 2F, 2H, 2W, out]."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, past)
        return x


class ResidualUp(nn.Module):
    """The same beside a way without parameters (Wan2.2)."""

    def __init__(self, channels: int, out: int, layers: int, upsample: Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(out if i else channels, out) for i in range(layers))
        self.upsampler = upsample
        self.out = out

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[F, H, W, in] → [F or 2F, 2H, 2W, out]."""
        start, first = x, self not in past.begun
        past.begun.add(self)
        for layer in self.resnets:
            x = layer(x, past)
        if self.upsampler is None:
            return x
        time = 1 if self.upsampler.time_conv is None else 2
        return self.upsampler(x, past).add_(repeat(start, self.out, time, first=first))


class ResidualDown(nn.Module):
    """Residual blocks and the way down beside a way without parameters (Wan2.2)."""

    def __init__(self, channels: int, out: int, layers: int, downsample: Downsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(out if i else channels, out) for i in range(layers))
        self.downsampler = downsample
        self.out = out

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[F, H, W, in] → [F or F/2, H/2, W/2, out]."""
        start, down = x, self.downsampler
        for layer in self.resnets:
            x = layer(x, past)
        x = x if down is None else down(x, past)
        time = 1 if down is None or down.time_conv is None else 2
        return x + average(start, self.out, time, 1 if down is None else 2)


class Decoder(nn.Module):
    """Latent frames → frames, one latent frame at a time."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        residual, layers = config["is_residual"], config["num_res_blocks"] + 1
        # Pixels around one that `wide` reads: two convolutions a residual block at half the size; those at the whole
        # size, the way up and the last one.
        self.rim = 2 * layers + layers + 1
        base = config["decoder_base_dim"] or config["base_dim"]
        times, factors = config["temperal_downsample"][::-1], config["dim_mult"][::-1]
        widths = [base * factor for factor in (factors[0], *factors)]
        self.conv_in, self.mid_block = Conv(config["z_dim"], widths[0]), Middle(widths[0])
        self.up_blocks = nn.ModuleList()
        for i, (channels, out) in enumerate(itertools.pairwise(widths)):
            upsample = None
            if i + 1 < len(factors):
                upsample = Upsample(out, out if residual else out // 2, time=times[i])
            come = channels if residual or i == 0 else channels // 2  # the way up has halved them
            self.up_blocks.append((ResidualUp if residual else Up)(come, out, layers, upsample))
        self.norm_out, self.conv_out = Norm(widths[-1], 1, 1, 1), Conv(widths[-1], config["out_channels"])

    def narrow(self, x: Tensor, past: Past) -> Tensor:
        """[1, h, w, C] → what is before the last two blocks, a half as wide and high as the frames."""
        x = self.mid_block(self.conv_in(x, past), past)
        for block in self.up_blocks[:-2]:
            x = block(x, past)
        return x

    def wide(self, x: Tensor, past: Past) -> Tensor:
        """That → [1 or 4, H, W, 3]."""
        for block in self.up_blocks[-2:]:
            x = block(x, past)
        return self.conv_out(x, past, self.norm_out)


class Encoder(nn.Module):
    """Frames → latent frames."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        residual, layers, times = config["is_residual"], config["num_res_blocks"], config["temperal_downsample"]
        widths = [config["base_dim"] * factor for factor in (1, *config["dim_mult"])]
        self.conv_in = Conv(config["in_channels"], widths[0])
        self.down_blocks = nn.ModuleList()
        for i, (channels, out) in enumerate(itertools.pairwise(widths)):
            down = Downsample(out, time=times[i]) if i + 1 < len(config["dim_mult"]) else None
            if residual:
                self.down_blocks.append(ResidualDown(channels, out, layers, down))
                continue
            self.down_blocks.extend(Residual(out if j else channels, out) for j in range(layers))
            if down is not None:
                self.down_blocks.append(down)
        self.mid_block, self.norm_out = Middle(widths[-1]), Norm(widths[-1], 1, 1, 1)
        self.conv_out = Conv(widths[-1], 2 * config["z_dim"])

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[1 or 4, H, W, 3] → [1, h, w, 2C]."""
        x = self.conv_in(x, past)
        for block in self.down_blocks:
            x = block(x, past)
        return self.conv_out(self.mid_block(x, past), past, self.norm_out)


class WanModel(nn.Module):
    """Both ways. What is between them, mean and spread of the latents, is whoever calls' business."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises: CorruptModel."""
        super().__init__()
        expect(config, attn_scales=[])
        latent, self.patch = config["z_dim"], config["patch_size"] or 1
        try:
            self.encoder, self.decoder = Encoder(config), Decoder(config)
        except (KeyError, TypeError, IndexError) as error:
            raise CorruptModel(f"vae/config.json does not describe an AutoencoderKLWan ({error}).") from None
        self.quant_conv = Pointwise(2 * latent, 2 * latent, 1, 1, 1)
        self.post_quant_conv = Pointwise(latent, latent, 1, 1, 1)

    @property
    def kept_bytes(self) -> int:
        """What decoding makes of weights and keeps while a video is under way."""
        weights: list[Tensor] = [layer.weight for layer in self.decoder.modules() if isinstance(layer, Conv)]
        weights += [
            layer.resample.weight[:, :, None] for layer in self.decoder.modules() if isinstance(layer, Upsample)
        ]
        return sum(map(filters_bytes, weights))

    def encode(self, pixels: Tensor) -> Tensor:
        """[F, H, W, 3] in -1 … 1, F = 4n + 1 → the most likely latents, [n + 1, h, w, C]."""
        pieces = [pixels[:1], *(pixels[1:].split(4) if len(pixels) > 1 else ())]
        past = Past(again=len(pieces) > 1)
        moments = torch.cat([self.encoder(patchify(piece, self.patch), past) for piece in pieces])
        return self.quant_conv(moments).chunk(2, dim=-1)[0]

    def decode(self, latents: Tensor, group: Group | None = None) -> Iterator[Tensor]:
        """Frames of each latent frame: one, then four each.

        Args:
            latents: [f, h, w, C].
            group: the ranks that share tiles of large frames, maybe one; None: no tiles.

        Yields: [1 or 4, H, W, 3], not clamped.
        """
        past, decoder = Past(again=len(latents) > 1), self.decoder
        tiled = None if group is None else Tiled(decoder.wide, decoder.rim, past, group)
        for z in latents.split(1):
            x = decoder.narrow(self.post_quant_conv(z), past)
            in_tiles = tiled is not None and max(x.shape[1:3]) > SIDE
            pixels = tiled(x) if tiled is not None and in_tiles else decoder.wide(x, past)
            yield unpatchify(pixels, self.patch)


def patchify(x: Tensor, size: int) -> Tensor:
    """[F, H, W, C] → [F, H / size, W / size, C · size²]; of a channel's pixels, those of one column come together."""
    frames, height, width, channels = x.shape
    parts = x.view(frames, height // size, size, width // size, size, channels)
    return parts.permute(0, 1, 3, 5, 4, 2).reshape(frames, height // size, width // size, -1).contiguous()


def unpatchify(x: Tensor, size: int) -> Tensor:
    """The way back."""
    frames, height, width, _ = x.shape
    parts = x.view(frames, height, width, -1, size, size).permute(0, 1, 5, 2, 4, 3)
    return parts.reshape(frames, height * size, width * size, -1)
