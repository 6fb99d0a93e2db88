"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.nn.slots import Cut, Extent, How, Slotted, hollow, share
from multimodal_gen.parallel.group import SOLO, Group


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension (Zhang and Sennrich, 2019), computed in float32, rounded once to x's dtype."""
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], None, eps)
    # torch's CPU kernel makes seven passes over x; this makes two.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).to(x.dtype)


def rms_normalize_thin(x: Tensor, eps: float) -> Tensor:
    """rms_normalize for a few rows on a CPU, where the number of calls counts: three instead of seven.

    A vector beside its negative has mean zero, so its standard deviation is the root mean square.
    """
    if x.device.type != "cpu":
        return rms_normalize(x, eps)
    dim = x.shape[-1]
    return F.layer_norm(torch.cat((x, -x), -1), (2 * dim,), None, None, eps)[..., :dim]


def rms_normalize_shared(x: Tensor, eps: float, group: Group) -> Tensor:
    """rms_normalize(x) where each rank holds an equal share of the last dimension: one float32 all-reduce of the mean
    squares of all that is normalised here."""
    if group.size == 1:
        return rms_normalize(x, eps)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    group.all_reduce_(squares)
    return (x * squares.div_(x.shape[-1] * group.size).add_(eps).rsqrt_()).to(x.dtype)


class RMSNorm(nn.Module):
    """rms_normalize(x) · weight over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps).mul_(self.weight)


class ThinRMSNorm(RMSNorm):
    """The same by `rms_normalize_thin`."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize_thin(x, self.eps) * self.weight


def layer_normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / std · weight + bias over the last dimension, in float32, rounded once to x's dtype.

    weight and bias are float32 [D], whatever the dtype of x.
    """
    if x.device.type == "cpu":  # its kernel takes both dtypes and computes in float32
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


class LayerNorm(nn.Module):
    """layer_normalize with float32 parameters."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(dim, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return layer_normalize(x, self.weight, self.bias, self.eps)


class AcrossHeadsRMSNorm(Slotted):
    """RMS norms over all heads together: x [T, P, H · D], each of the P parts with its own weight.

    Ranks that share the heads hold [P, H · D / size] and agree on the mean squares of all parts at once.
    """

    def __init__(self, parts: tuple[str, ...], dim: int, eps: float) -> None:
        super().__init__()
        self.part_names = parts
        self.eps = eps
        self.group = SOLO  # filled by shard_
        self.weight = nn.Parameter(torch.ones(len(parts), dim), requires_grad=False)

    def extent(self, part: str | None) -> Extent:
        """The row of one part."""
        index = self.part_names.index(part)
        return Extent(slice(index, index + 1), slice(0, self.weight.shape[1]))

    def slot(self, part: str | None) -> Tensor:
        """Weight of one part: [H · D]."""
        return super().slot(part)[0]

    def shard_(self, how: How, group: Group, name: str) -> None:
        """Raises: ConfigError."""
        assert how == "heads", f"{name}: a norm across heads is shared out by heads, not by {how}"
        parts, dim = self.weight.shape
        self.weight = hollow((parts, share(dim, group, name)), self.weight)
        self.cuts, self.group = {"weight": Cut(0, group.rank, group.size)}, group

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize_shared(x, self.eps, self.group).mul_(self.weight)


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
