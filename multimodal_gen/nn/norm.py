"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.kernels.norm_modulate import Norm, norm_modulate, rms_norm_scale
from multimodal_gen.kernels.qk_norm_rope import qk_norm_rope_
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


class RMSNorm(nn.Module):
    """rms_normalize(x) · weight over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] → [T, D]."""
        return rms_norm_scale(x, self.weight[None], None, self.eps)

    def as_norm(self) -> Norm:
        """Itself, for a kernel that does something else with x, too."""
        return Norm("rms", self.weight[None], None, None, self.eps)


class ThinRMSNorm(RMSNorm):
    """The same by `rms_normalize_thin` on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dim() == 2:
            return super().forward(x)
        return rms_normalize_thin(x, self.eps) * self.weight


class LayerNorm(nn.Module):
    """(x - mean) / std · weight + bias, with float32 parameters whatever the dtype of x."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(dim, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] → [T, D]."""
        return norm_modulate(x, self.as_norm())

    def as_norm(self) -> Norm:
        """Itself, for a kernel that does something else with x, too."""
        return Norm("layer", self.weight[None], self.bias[None], None, self.eps)


class AcrossHeadsRMSNorm(Slotted):
    """RMS norms over all heads together, of the first N parts of x [T, P, H, D], each with its own weight; and a turn.

    Ranks that share the heads hold [N, H · D / size] and agree on the mean squares of all parts at once.
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

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        """x [T, P, H, D] in place, turned by float32 [T, 2, D / 2]; returns x."""
        shared = None if self.group.size == 1 else self._mean_squares(x[:, : len(self.weight)].flatten(2))
        return qk_norm_rope_(x, self.weight, turns, self.eps, mean_square=shared)

    def _mean_squares(self, x: Tensor) -> Tensor:
        """x [T, N, H · D / size] → float32 [T, N] over all ranks, by one all-reduce."""
        squares = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square_()
        self.group.all_reduce_(squares)
        return squares.div_(x.shape[-1] * self.group.size)


class PartedRMSNorm(Slotted):
    """RMS norms of every head, of the first N parts of x [T, P, H, D], each with its own weight; and a turn."""

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

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        """x [T, P, H, D] in place, turned by float32 [T, 2, D / 2]; returns x."""
        return qk_norm_rope_(x, self.weight, turns, self.eps)
