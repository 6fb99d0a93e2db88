"""Queries and keys of Z-Image 6B (30 heads of 128), Wan2.2 A14B (40 of 128, norms across heads), Qwen3-8B (halves)."""

from __future__ import annotations

from typing import Any

import torch

from multimodal_gen.kernels.gpu.qk_norm_rope import qk_norm_rope_
from tests.kernels.ahead import Cases, Empty


def _launch(empty: Empty, heads: int, dtype: torch.dtype, *, across: bool = False, **options: Any) -> Any:
    x, turns = empty(4128, 3, heads, 128, dtype=dtype), empty(4128, 2, 64, dtype=torch.float32)
    weight = empty(2, heads * 128 if across else 128, dtype=dtype)
    return qk_norm_rope_(x, weight, turns, 1e-6, **options)


def _shared(empty: Empty) -> Any:
    return _launch(empty, 20, torch.bfloat16, across=True, mean_square=empty(4128, 2, dtype=torch.float32))


CASES: Cases = {
    "each of 30 heads, bf16": lambda empty: _launch(empty, 30, torch.bfloat16),
    "each of 30 heads, fp32": lambda empty: _launch(empty, 30, torch.float32),
    "across 40 heads, bf16": lambda empty: _launch(empty, 40, torch.bfloat16, across=True),
    "across 40 heads, fp32": lambda empty: _launch(empty, 40, torch.float32, across=True),
    "across heads of two ranks, bf16": _shared,
    "each of 8 heads in halves, bf16": lambda empty: _launch(empty, 8, torch.bfloat16, pairs="halves"),
}
