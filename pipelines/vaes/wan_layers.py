"""The blocks of Wan's VAE (Wan, 2025, section 4.1), in channels-last order: convolutions that remember frames.

A video goes through frame by frame, or a few frames at a time; `Past` is what a convolution keeps of one video from one
call to the next. Reference: diffusers' AutoencoderKLWan, whose names of weights these modules have.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.kernels.conv3x3 import conv3x3, make_filters
from multimodal_gen.kernels.rms_norm_silu import rms_norm_silu
from multimodal_gen.pipelines.vaes.layers import Filter, Pointwise, attend

KEPT = 2  # frames that a convolution over three remembers


@dataclass
class Past:
    """Of one video, while it is on its way."""

    again: bool  # filled by whoever begins: more frames will come, so what is made of weights is worth keeping
    frames: dict[nn.Module, Tensor] = field(default_factory=dict)  # the last ones that each convolution has seen
    filters: dict[nn.Module, Tensor | None] = field(default_factory=dict)  # of each convolution
    begun: set[nn.Module] = field(default_factory=set)  # what treats the first frame in its own way and has done so

    def extended(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, int]:
        """Room for the frames that `layer` remembers, filled, and new ones like these, for the caller to fill."""
        before = self.frames.get(layer)
        count = 0 if before is None else len(before)
        room = like.new_empty(count + len(like), *like.shape[1:])
        if before is not None:
            room[:count] = before
        return room, count

    def remember(self, layer: nn.Module, frames: Tensor) -> None:
        """Keep the last of what `layer` has seen."""
        kept = frames[-KEPT:]
        self.frames[layer] = kept if len(frames) <= KEPT + 1 else kept.clone()


class Norm(nn.Module):
    """RMS over the channels of a pixel, mostly with the SiLU after it."""

    def __init__(self, channels: int, *ones: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *ones), requires_grad=False)

    def forward(self, x: Tensor, *, silu: bool = True, out: Tensor | None = None) -> Tensor:
        """[F, H, W, C] → the same; `out` may be x."""
        return rms_norm_silu(x, self.gamma.flatten(), silu=silu, out=out)


class Conv(Filter):
    """3x3 over three frames: this one and the two before."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, 3, 3)

    def forward(self, x: Tensor, past: Past, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """[F, H, W, in] → [F, H, W, out] of the frames after `norm`, with `residual` added."""
        room, history = past.extended(self, x)
        if norm is None:
            room[history:] = x
        else:
            norm(x, out=room[history:])
        past.remember(self, room)
        if past.again and self not in past.filters:
            past.filters[self] = make_filters(self.weight)
        filters = past.filters.get(self)
        return conv3x3(room, self.weight, self.bias, history=history, residual=residual, filters=filters)


class Residual(nn.Module):
    """Two convolutions beside what comes in."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(channels, 1, 1, 1), Conv(channels, out)
        self.norm2, self.conv2 = Norm(out, 1, 1, 1), Conv(out, out)
        self.conv_shortcut = Pointwise(channels, out, 1, 1, 1) if channels != out else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[F, H, W, in] → [F, H, W, out]."""
        h = self.conv1(x, past, self.norm1)
        return self.conv2(h, past, self.norm2, x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """One head over all pixels of a frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, 1, 1)
        self.to_qkv, self.proj = Pointwise(channels, 3 * channels, 1, 1), Pointwise(channels, channels, 1, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[F, H, W, C] → the same."""
        q, k, v = self.to_qkv(self.norm(x, silu=False)).flatten(1, 2).chunk(3, dim=-1)
        return self.proj(attend(q, k, v).view_as(x)).add_(x)


class Middle(nn.Module):
    """At the size of the latents."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList(Residual(channels, channels) for _ in range(2))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[F, h, w, C] → the same."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, past), past), past)


class OverTime(Filter):
    """A convolution over three frames, one pixel at a time."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, 1, 1)

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        """[F, H, W, in] → [(F - 3) // stride + 1, H, W, out]."""
        y = F.conv3d(x.permute(3, 0, 1, 2)[None], self.weight, self.bias, stride=(stride, 1, 1))
        return y[0].permute(1, 2, 3, 0).contiguous()


class Upsample(nn.Module):
    """Twice as wide and high; over time, too, but for the first frame."""

    def __init__(self, channels: int, out: int, *, time: bool) -> None:
        super().__init__()
        self.resample = Filter(channels, out, 3, 3)
        self.time_conv = OverTime(channels, 2 * channels) if time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[F, H, W, in] → [F or 2F, 2H, 2W, out]."""
        if self.time_conv is not None:
            x = self._longer(self.time_conv, x, past)
        conv = self.resample
        if past.again and conv not in past.filters:
            past.filters[conv] = make_filters(conv.weight[:, :, None])
        return conv3x3(x, conv.weight[:, :, None], conv.bias, double=True, filters=past.filters.get(conv))

    def _longer(self, conv: OverTime, x: Tensor, past: Past) -> Tensor:
        if self not in past.begun:
            past.begun.add(self)
            return x
        if self not in past.frames:  # before the second latent frame there are zeros, not the first one
            past.frames[self] = x.new_zeros(KEPT, *x.shape[1:])
        room, history = past.extended(self, x)
        room[history:] = x
        past.remember(self, room)
        pairs = conv(room).unflatten(-1, (2, -1))  # [F, H, W, 2, C]
        return pairs.permute(0, 3, 1, 2, 4).flatten(0, 1).contiguous()


class Downsample(nn.Module):
    """Half as wide and high; over time, too, but for the first frame."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.resample = Filter(channels, channels, 3, 3)
        self.time_conv = OverTime(channels, channels) if time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[F, H, W, C] → [F or F/2, H/2, W/2, C]."""
        conv = self.resample
        y = F.conv2d(F.pad(x.permute(0, 3, 1, 2), (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
        x = y.permute(0, 2, 3, 1).contiguous()
        if self.time_conv is None:
            return x
        if self not in past.frames:
            past.frames[self] = x[-1:]
            return x
        room = torch.cat([past.frames[self], x])
        past.frames[self] = x[-1:]
        return self.time_conv(room, stride=2)


def repeat(x: Tensor, out: int, time: int, *, first: bool) -> Tensor:
    """The parameterless way up beside residual blocks (Wan2.2): channels become pixels, and frames where `time` is 2.

    [F, H, W, in] → [F · time, 2H, 2W, out], less the first of `time` frames at the beginning of a video.
    """
    frames, height, width, channels = x.shape
    parts = x.repeat_interleave(out * time * 4 // channels, dim=-1).view(frames, height, width, out, time, 2, 2)
    y = parts.permute(0, 4, 1, 5, 2, 6, 3).reshape(frames * time, 2 * height, 2 * width, out)
    return y[time - 1 :] if first else y


def average(x: Tensor, out: int, time: int, space: int) -> Tensor:
    """The way down (Wan2.2): pixels, and frames where `time` is 2, become channels, and groups of these their mean."""
    x = F.pad(x, (0, 0, 0, 0, 0, 0, -len(x) % time, 0))
    frames, height, width, channels = x.shape
    parts = x.view(frames // time, time, height // space, space, width // space, space, channels)
    grouped = parts.permute(0, 2, 4, 6, 1, 3, 5).reshape(frames // time, height // space, width // space, out, -1)
    return grouped.mean(-1)
