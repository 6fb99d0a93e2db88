"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.nn.slots import Slotted


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang and Sennrich, 2019), computed in float32, rounded once."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PartedRMSNorm(Slotted):
    """RMS norms of several parts in one call: x [..., P, H, D], each part with its own weight over D."""

    def __init__(self, parts: tuple[str, ...], dim: int, eps: float) -> None:
        super().__init__()
        self.part_names = parts
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(len(parts), dim), requires_grad=False)

    def slot(self, part: str | None) -> Tensor:
        """Weight of one part: [D]."""
        return self.weight[self.part_names.index(part)]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape[-1:], None, self.eps) * self.weight[:, None]
