"""The decoder of AutoencoderKL (Rombach et al., 2022) in channels-last order, one picture at a time.

Reference: diffusers' AutoencoderKL. Its encoder is not here: no family of ours that has this VAE starts from pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from multimodal_gen.errors import CorruptModel
from multimodal_gen.kernels.conv3x3 import conv3x3, filters_bytes, make_filters
from multimodal_gen.kernels.group_norm_silu import group_norm_silu
from multimodal_gen.pipelines.vaes.layers import Filter, Pointwise, attend, expect

EPS = 1e-6
KEPT = 3 << 20  # bytes of filters that a layer keeps: making them takes a small picture half as long as using them
IGNORED = (r"encoder\..*", r"quant_conv\..*")


class Conv(Filter):
    """3x3, as large as before."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, 3)
        self._filters: Tensor | None = None  # kept where they are small; filled by forward

    @property
    def kept_bytes(self) -> int:
        """Of filters that stay from one picture to the next."""
        found = filters_bytes(self.weight[:, :, None])
        return found if found <= KEPT else 0

    def forget(self) -> None:
        """Let go of them."""
        self._filters = None

    def forward(self, x: Tensor, residual: Tensor | None = None, *, double: bool = False) -> Tensor:
        """[1, H, W, in] → [1, H, W, out], twice as large with `double`."""
        weight = self.weight[:, :, None]
        if self._filters is None and self.kept_bytes:
            self._filters = make_filters(weight)
        return conv3x3(x, weight, self.bias, residual=residual, double=double, filters=self._filters)


class Norm(nn.Module):
    """GroupNorm, mostly with the SiLU after it."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(channels), requires_grad=False)
        self.groups = groups

    def forward(self, x: Tensor, *, silu: bool = True, out: Tensor | None = None) -> Tensor:
        """[1, H, W, C] → the same; `out` may be x."""
        to = None if out is None else out[0]
        return group_norm_silu(x[0], self.weight, self.bias, self.groups, EPS, silu=silu, out=to)[None]


class Resnet(nn.Module):
    """Two convolutions beside what comes in."""

    def __init__(self, groups: int, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(groups, channels), Conv(channels, out)
        self.norm2, self.conv2 = Norm(groups, out), Conv(out, out)
        self.conv_shortcut = Pointwise(channels, out, 1, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        """[1, H, W, in] → [1, H, W, out]."""
        h = self.conv1(self.norm1(x))
        beside = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return self.conv2(self.norm2(h, out=h), beside)


class Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.group_norm = Norm(groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[1, H, W, C] → the same."""
        pixels = self.group_norm(x, silu=False).flatten(1, 2)
        mixed = attend(self.to_q(pixels), self.to_k(pixels), self.to_v(pixels))
        return x + self.to_out[0](mixed).view_as(x)


class Middle(nn.Module):
    """At the size of the latents."""

    def __init__(self, groups: int, channels: int, *, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(groups, channels)] if attention else [])
        self.resnets = nn.ModuleList(Resnet(groups, channels, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[1, h, w, C] → the same."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Upsampler(nn.Module):
    """Twice as large."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[1, H, W, C] → [1, 2H, 2W, C]."""
        return self.conv(x, double=True)


class Up(nn.Module):
    """Residual blocks of one size, then the way to the next."""

    def __init__(self, groups: int, channels: int, out: int, layers: int, *, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(groups, out if i else channels, out) for i in range(layers))
        self.upsamplers = nn.ModuleList([] if last else [Upsampler(out)])

    def forward(self, x: Tensor) -> Tensor:
        """[1, H, W, in] → [1, 2H, 2W, out], or of the same size where it is the last."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Latents → pixels."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        groups, widths, layers = (
            config["norm_num_groups"],
            config["block_out_channels"][::-1],
            config["layers_per_block"],
        )
        self.conv_in = Conv(config["latent_channels"], widths[0])
        self.mid_block = Middle(groups, widths[0], attention=config.get("mid_block_add_attention", True))
        self.up_blocks = nn.ModuleList(
            Up(groups, widths[max(i - 1, 0)], width, layers + 1, last=i == len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = Norm(groups, widths[-1])
        self.conv_out = Conv(widths[-1], config["out_channels"])

    def blocks(self, z: Tensor) -> Iterator[Tensor]:
        """[1, h, w, C] → what each block makes of it; the last are the pixels, [1, H, W, 3]."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            yield x
            x = block(x)
        yield self.conv_out(self.conv_norm_out(x, out=x))


class KLModel(nn.Module):
    """What of an AutoencoderKL decodes."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises: CorruptModel."""
        super().__init__()
        blocks = ["UpDecoderBlock2D"] * len(config["block_out_channels"])
        expect(config, act_fn="silu", up_block_types=blocks)
        latent = config["latent_channels"]
        self.post_quant_conv = Pointwise(latent, latent, 1, 1) if config.get("use_post_quant_conv", True) else None
        try:
            self.decoder = Decoder(config)
        except (KeyError, TypeError, IndexError) as error:
            raise CorruptModel(f"vae/config.json does not describe an AutoencoderKL ({error}).") from None

    @property
    def kept_bytes(self) -> int:
        """What convolutions keep from one picture to the next."""
        return sum(each.kept_bytes for each in self.modules() if isinstance(each, Conv))

    def forget(self) -> None:
        """Let go of it."""
        for each in self.modules():
            if isinstance(each, Conv):
                each.forget()

    @property
    def count(self) -> int:
        """How many there are of `blocks`."""
        return 1 + len(self.decoder.up_blocks)

    def blocks(self, z: Tensor) -> Iterator[Tensor]:
        """[C, h, w] → see `Decoder.blocks`."""
        x = z.permute(1, 2, 0)[None].contiguous()
        return self.decoder.blocks(x if self.post_quant_conv is None else self.post_quant_conv(x))

    def forward(self, z: Tensor) -> Tensor:
        """[C, h, w] → [H, W, 3]."""
        for x in self.blocks(z):
            pixels = x
        return pixels[0]
