"""One new token per sequence over pages: heads of Qwen3-8B (32 over 8), SmolLM2-135M (9 over 3)."""

from __future__ import annotations

import torch

from multimodal_gen.kernels.paged_decode import paged_decode
from tests.kernels.ahead import Cases, Empty


def _launch(empty: Empty, heads: int, kv_heads: int, dim: int, splits: int, dtype: torch.dtype) -> None:
    q, cache = empty(8, heads, dim, dtype=dtype), empty(2, 100, kv_heads, 16, dim, dtype=dtype)
    paged_decode(q, cache, empty(8, 64, dtype=torch.int32), empty(8, dtype=torch.int32), splits, 1000)


CASES: Cases = {
    "32 over 8 heads of 128, bf16": lambda empty: _launch(empty, 32, 8, 128, 1, torch.bfloat16),
    "32 over 8 heads of 128, bf16, 8 parts": lambda empty: _launch(empty, 32, 8, 128, 8, torch.bfloat16),
    "32 over 8 heads of 128, fp16": lambda empty: _launch(empty, 32, 8, 128, 1, torch.float16),
    "9 over 3 heads of 64, fp32": lambda empty: _launch(empty, 9, 3, 64, 1, torch.float32),
}
