"""torch.nn.functional.scaled_dot_product_attention: every device; one call per run of equally long segments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.attention.segments import Segments


class SdpaAttention:
    """The default backend."""

    name = "sdpa"

    @staticmethod
    def unavailable(device: torch.device) -> str:
        """Always available."""
        return ""

    @staticmethod
    def preferred(device: torch.device) -> bool:
        """Everywhere."""
        return True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v [T, H, D] → [T, H, D]."""
        outputs = []
        for run in segments.runs:
            q_r, k_r, v_r = (run.tokens(x).transpose(1, 2) for x in (q, k, v))  # [count, H, length, D]
            outputs.append(F.scaled_dot_product_attention(q_r, k_r, v_r).transpose(1, 2).flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
