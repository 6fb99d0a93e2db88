"""Rotary position embedding over several axes (Su et al., 2021), in the adjacent-pair convention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def axis_frequencies(
    positions: Tensor, axes: Sequence[int], theta: float, angles_in: torch.dtype = torch.float32
) -> Tensor:
    """Rotations e^{iθp} for integer positions [L, len(axes)] → complex64 [L, Σ axes / 2].

    Angles are computed in float64. Before the sine they are rounded to `angles_in`, as the tables of the family's
    reference are.
    """
    parts = []
    for axis, dim in enumerate(axes):
        inverse = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        angles = torch.outer(positions[:, axis].double(), inverse).to(angles_in)
        parts.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(parts, dim=-1).to(torch.complex64)


def rotate_(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotate adjacent pairs of x [T, ..., D] by frequencies complex64 [T, D/2], in float32; x may be overwritten."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    shape = (frequencies.shape[0],) + (1,) * (x.dim() - 2) + (frequencies.shape[1],)
    return torch.view_as_real(pairs.mul_(frequencies.view(shape))).flatten(-2).to(x.dtype)
