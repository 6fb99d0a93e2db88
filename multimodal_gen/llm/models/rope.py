"""Rotary positions in the convention of transformers: the halves of a head turn (Su et al., 2021)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from multimodal_gen.llm.models.config import RopeConfig, RopeScaling


class Rotation(NamedTuple):
    """Of the tokens of one forward, in the dtype of queries: both [T, 1, D]."""

    cos: Tensor
    sin: Tensor  # negative in the first half: it meets a head with its halves swapped
    turns: Tensor | None  # float32 [T, 2, D / 2], as `qk_norm_rope_` has them; on a GPU

    def turn_(self, x: Tensor) -> None:
        """Turn x [T, H, D] in place."""
        swapped = x.roll(x.shape[-1] // 2, -1)
        x.mul_(self.cos).add_(swapped.mul_(self.sin))  # on a CPU addcmul_ takes ten times as long in bfloat16


class Rope(nn.Module):
    """Positions → rotations."""

    frequencies: Tensor  # float32 [D/2]

    def __init__(self, config: RopeConfig) -> None:
        super().__init__()
        self.scale = 1.0 if config.scaling is None else config.scaling.attention_factor
        # Computed here and not read, so it has memory where the weights have none yet.
        self.register_buffer("frequencies", frequencies(config), persistent=False)
        self.factors: nn.Parameter | None = None  # divisors, float32 [D/2]; from the file
        if config.factors:
            self.factors = nn.Parameter(torch.empty(config.dim // 2, dtype=torch.float32), requires_grad=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """int64 [T]; angles in float32."""
        turns = self.frequencies if self.factors is None else self.frequencies / self.factors
        angles = torch.outer(positions.float(), turns)
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        whole = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        wide = torch.stack((cos, sin), 1) if cos.is_cuda else None
        return Rotation(whole[0][:, None].to(dtype), whole[1][:, None].to(dtype), wide)


def frequencies(config: RopeConfig) -> Tensor:
    """Radians per token: float32 [D/2] on the CPU, whatever the default device."""
    steps = torch.arange(0, config.dim, 2, dtype=torch.float32, device="cpu") / config.dim
    plain = 1.0 / (config.theta**steps)
    scaling = config.scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    return _llama3(plain, scaling) if scaling.kind == "llama3" else _yarn(plain, scaling, config)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are stretched, short ones stay, those between are mixed (Llama 3.1)."""
    turns = scaling.original * plain / (2 * math.pi)  # within the original context
    share = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)  # that stays
    return plain * ((1 - share) / scaling.factor + share)


def _yarn(plain: Tensor, scaling: RopeScaling, config: RopeConfig) -> Tensor:
    """Peng et al., 2023: as above, with a ramp over dimensions instead of wavelengths."""

    def dimension(turns: float) -> float:
        wavelength = scaling.original / (turns * 2 * math.pi)
        return config.dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    index = torch.arange(config.dim // 2, dtype=torch.float32, device="cpu")
    stretched = ((index - low) / ((high - low) or 0.001)).clamp(0, 1)
    return plain * (stretched / scaling.factor + 1 - stretched)
