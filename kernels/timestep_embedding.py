"""Sinusoidal embeddings of timesteps (Vaswani et al., 2017, as Nichol and Dhariwal, 2021, arrange them).

On a CPU torch computes: there is one row per timestep, and models keep what they make of it. Frequencies of another
libm would differ in the last place, which a time of 1000 makes an error of 1e-4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multimodal_gen.kernels import native


def timestep_embedding(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """values float32 [N] → float32 [N, dim]: cosines in the first half, sines in the second; dim is even."""
    assert values.dim() == 1, values.shape
    assert values.dtype == torch.float32, values.dtype
    assert dim % 2 == 0, dim
    if native.by_triton(values):
        from multimodal_gen.kernels.gpu import timestep_embedding

        return timestep_embedding.timestep_embedding(values, dim, max_period)
    return reference(values, dim, max_period)


def reference(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """The same by torch."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device)
    frequencies = torch.exp(-math.log(max_period) * exponents / half)
    angles = values[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
