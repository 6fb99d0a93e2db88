"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.nn.slots import Extent, Slotted


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension (Zhang and Sennrich, 2019), computed in float32, rounded once to x's dtype."""
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], None, eps)
    # torch's CPU kernel makes seven passes over x; this makes two.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).to(x.dtype)


class RMSNorm(nn.Module):
    """rms_normalize(x) · weight over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps).mul_(self.weight)


class PartedRMSNorm(Slotted):
    """RMS norms of several parts in one call: x [..., P, H, D], each part with its own weight over D."""

    def __init__(self, parts: tuple[str, ...], dim: int, eps: float) -> None:
        super().__init__()
        self.part_names = parts
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(len(parts), dim), requires_grad=False)

    def extent(self, part: str | None) -> Extent:
        """The row of one part."""
        index = self.part_names.index(part)
        return Extent(slice(index, index + 1), slice(0, self.weight.shape[1]))

    def slot(self, part: str | None) -> Tensor:
        """Weight of one part: [D]."""
        return super().slot(part)[0]

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps).mul_(self.weight[:, None])
