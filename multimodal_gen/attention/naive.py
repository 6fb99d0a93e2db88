"""Attention written out in float32: the reference that faster backends are compared with. Slow; debugging only."""

from __future__ import annotations

import torch
from torch import Tensor

from multimodal_gen.attention.segments import Segments


class NaiveAttention:
    """softmax(q kᵀ / √D) v, one segment at a time."""

    name = "naive"
    gives_lse = True

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
        return self.with_lse(q, k, v, segments, segments)[0]

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments) -> tuple[Tensor, Tensor]:
        """q [T, H, D], k and v [K, H, D] → [T, H, D], float32 [T, H]."""
        outputs, sums = [], []
        for q_s, k_s, v_s in zip(q.split(segments.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q_s.float(), k_s.float()) / q_s.shape[-1] ** 0.5
            lse = scores.logsumexp(-1)  # -inf without keys
            weights = (scores - lse[..., None]).exp()
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v_s.float()).to(q.dtype))
            sums.append(lse.T)
        return torch.cat(outputs), torch.cat(sums)
