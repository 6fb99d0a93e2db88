"""Attention on CPUs whose BLAS is slower than oneDNN.

Scores in float32 through `float32_product`, a block of queries at a time, softmax in float32, and the second product in
the dtype of the values.

torch's own CPU kernel makes its scores with the BLAS: on AMD processors with AVX-512 that costs more than half of the
time of attention at 1,000 tokens (a Zen 5: 1.9 times the time of this backend). On short sequences, and wherever there
are tiles (AMX), torch's kernel is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multimodal_gen.attention.native import amd_without_tiles
from multimodal_gen.attention.sdpa import SdpaAttention
from multimodal_gen.attention.segments import Segments
from multimodal_gen.kernels.float32_product import float32_product
from multimodal_gen.nn.precision import compute_dtype

MIN_TOKENS = 512
SCORE_BYTES = 6 << 20  # of one block of queries: it stays in the cache


class OneDnnAttention:
    """Per segment and head; segments below `MIN_TOKENS` go to `sdpa`."""

    name = "onednn"
    gives_lse = False

    def __init__(self) -> None:
        self.short = SdpaAttention()

    @staticmethod
    def unavailable(device: torch.device) -> str:
        """CPUs only."""
        return "" if device.type == "cpu" else "it is for CPUs"

    @staticmethod
    def preferred(device: torch.device) -> bool:
        """Where it was measured to be faster than torch's, and `native` cannot be compiled."""
        return amd_without_tiles()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v [T, H, D] → [T, H, D]."""
        if all(run.length < MIN_TOKENS for run in segments.runs):
            return self.short(q, k, v, segments)
        outputs = []
        for q_s, k_s, v_s in zip(*(x.split(segments.lengths) for x in (q, k, v)), strict=True):
            if len(q_s) < MIN_TOKENS:
                outputs.append(self.short(q_s, k_s, v_s, Segments.of([len(q_s)])))
            else:
                outputs.append(_attend(q_s, k_s, v_s))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One segment: q, k, v [L, H, D] → [L, H, D]."""
    length, heads, head_dim = q.shape
    dtype = compute_dtype(v.dtype, v.device)
    scaled = (q.float() * head_dim**-0.5).transpose(0, 1).contiguous()  # [H, L, D]
    keys = k.float().transpose(0, 1).contiguous()
    values = v.to(dtype).permute(1, 2, 0).contiguous()  # [H, D, L]
    output = torch.empty_like(q)
    step = max(1, SCORE_BYTES // (4 * length))
    for head in range(heads):
        for start in range(0, length, step):
            scores = float32_product(scaled[head, start : start + step], keys[head].T)
            weights = scores.softmax(-1)
            if dtype == torch.float32:
                output[start : start + step, head] = float32_product(weights, values[head].T)
            else:
                output[start : start + step, head] = weights.to(dtype) @ values[head].T
    return output
