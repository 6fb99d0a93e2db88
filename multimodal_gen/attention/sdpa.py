"""torch.nn.functional.scaled_dot_product_attention: every device; one call per run of equally long segments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.attention.segments import Segments, paired_runs


class SdpaAttention:
    """The default backend."""

    name = "sdpa"
    gives_lse = True

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

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments) -> tuple[Tensor, Tensor]:
        """q [T, H, D], k and v [K, H, D] → [T, H, D], float32 [T, H]."""
        outputs, sums = q.new_zeros(q.shape), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for ours, theirs in paired_runs(segments, keys):
            if ours.length and theirs.length:
                out, lse = _with_lse(
                    *(run.tokens(x).transpose(1, 2) for run, x in ((ours, q), (theirs, k), (theirs, v)))
                )
                ours.tokens(outputs).copy_(out.transpose(1, 2))
                ours.tokens(sums).copy_(lse.transpose(1, 2))
        return outputs, sums


def _with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, H, L, D], k and v [B, H, K, D] → [B, H, L, D], float32 [B, H, L], by the kernels that SDPA calls."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse
    scale, head_dim = q.shape[-1] ** -0.5, q.shape[-1]
    if head_dim % 8:  # the kernels want aligned heads
        q, k, v = (F.pad(x, (0, -head_dim % 8)) for x in (q, k, v))
    if q.dtype != torch.float32:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    else:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return found[0][..., :head_dim], found[1][..., : q.shape[2]]  # the log-sum-exp may be padded
