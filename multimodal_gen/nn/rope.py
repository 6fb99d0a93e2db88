"""Rotary position embedding over several axes (Su et al., 2021): tables for `kernels.qk_norm_rope`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def axis_turns(positions: Tensor, axes: Sequence[int], theta: float, angles_in: torch.dtype = torch.float32) -> Tensor:
    """Integer positions [L, len(axes)] → float32 [L, 2, Σ axes / 2]: cosines and sines of the angles θp.

    Angles are computed in float64. Before the sine they are rounded to `angles_in`, as the tables of the family's
    reference are.
    """
    parts = []
    for axis, dim in enumerate(axes):
        inverse = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        angles = torch.outer(positions[:, axis].double(), inverse).to(angles_in)
        turns = torch.polar(torch.ones_like(angles), angles)  # as the references do: its cosine has other last bits
        parts.append(torch.stack([turns.real, turns.imag], dim=1))
    return torch.cat(parts, dim=-1).float()
