"""Embeddings of scalars."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """values [N] → float32 [N, dim]: cosines in the first half, sines in the second (Nichol and Dhariwal, 2021)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device)
    frequencies = torch.exp(-math.log(max_period) * exponents / half)
    angles = values.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
