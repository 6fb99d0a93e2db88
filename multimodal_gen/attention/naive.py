"""Attention written out in float32: the reference that faster backends are compared with. Slow; debugging only."""

from __future__ import annotations

import torch
from torch import Tensor

from multimodal_gen.attention.segments import Segments


class NaiveAttention:
    """softmax(q kᵀ / √D) v, one segment at a time."""

    name = "naive"

    @staticmethod
    def unavailable(device: torch.device) -> str:
        """Always available."""
        return ""

    @staticmethod
    def preferred(device: torch.device) -> bool:
        """Nowhere: it is slow."""
        return False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v [T, H, D] → [T, H, D]."""
        outputs = []
        for q_s, k_s, v_s in zip(*(x.split(segments.lengths) for x in (q, k, v)), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q_s.float(), k_s.float()) / q_s.shape[-1] ** 0.5
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_s.float()).to(q.dtype))
        return torch.cat(outputs)
