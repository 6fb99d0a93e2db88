"""Classifier-free guidance (Ho and Salimans, 2022)."""

from __future__ import annotations

import torch
from torch import Tensor


def extrapolate(positive: Tensor, negative: Tensor, weight: float) -> Tensor:
    """negative + weight · (positive - negative) in float32: the convention in which weight 1 is no guidance."""
    positive, negative = positive.float(), negative.float()
    return negative + weight * (positive - negative)


def guide(positive: Tensor, negative: Tensor, weight: float, norm_cap: float) -> Tensor:
    """positive + weight · (positive - negative) in float32.

    `norm_cap` > 0 shrinks the result so that its norm stays below norm_cap · ‖positive‖.
    """
    positive, negative = positive.float(), negative.float()
    guided = positive + weight * (positive - negative)
    if norm_cap > 0:
        limit = torch.linalg.vector_norm(positive) * norm_cap
        norm = torch.linalg.vector_norm(guided)
        guided = guided * torch.where(norm > limit, limit / norm, 1.0)
    return guided
