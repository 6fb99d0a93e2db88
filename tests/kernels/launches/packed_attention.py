"""Attention of Z-Image 6B (30 heads of 128), of ring ranks, of text (causal, 32 over 8 heads) and of other widths."""

from __future__ import annotations

import torch

from multimodal_gen.kernels.gpu.packed_attention import packed_attention
from tests.kernels.ahead import Cases, Empty

LENGTHS = (4160, 1056)


def _launch(
    empty: Empty,
    dim: int,
    dtype: torch.dtype,
    *,
    heads: int = 30,
    kv_heads: int = 30,
    causal: bool = False,
    with_lse: bool = False,
) -> None:
    total = sum(LENGTHS)
    qkv = empty(total, heads + 2 * kv_heads, dim, dtype=dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    lse = empty(total, heads, dtype=torch.float32) if with_lse else None
    packed_attention(q, k, v, LENGTHS, LENGTHS, (1, 1), causal, empty(total, heads, dim, dtype=dtype), lse)


CASES: Cases = {
    "128, bf16": lambda empty: _launch(empty, 128, torch.bfloat16),
    "128, bf16, lse": lambda empty: _launch(empty, 128, torch.bfloat16, with_lse=True),
    "128, fp16, causal, 32 over 8": lambda empty: _launch(empty, 128, torch.float16, heads=32, kv_heads=8, causal=True),
    "64, bf16": lambda empty: _launch(empty, 64, torch.bfloat16),
    "96, bf16": lambda empty: _launch(empty, 96, torch.bfloat16),
    "256, bf16": lambda empty: _launch(empty, 256, torch.bfloat16),
    "128, fp32": lambda empty: _launch(empty, 128, torch.float32),
}
