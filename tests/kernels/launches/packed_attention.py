"""Z-Image 6B (30 heads of 128), Wan2.2 A14B on a ring (40 of 128), a decoder's prompt (32 over 8), other widths."""

from __future__ import annotations

import torch

from multimodal_gen.kernels.gpu.packed_attention import packed_attention
from tests.kernels.ahead import Cases, Empty


def _launch(
    empty: Empty, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, *, causal: bool = False, sums: bool = False
) -> None:
    q, kv = empty(4128, heads, dim, dtype=dtype), empty(4128, 2, kv_heads, dim, dtype=dtype)
    lse = empty(4128, heads, dtype=torch.float32) if sums else None
    lengths = (4096, 32)
    packed_attention(q, *kv.unbind(1), lengths, lengths, (1, 1), causal, empty(*q.shape, dtype=dtype), lse)


CASES: Cases = {
    "30 heads of 128, bf16": lambda empty: _launch(empty, 30, 30, 128, torch.bfloat16),
    "40 heads of 128 with sums, bf16": lambda empty: _launch(empty, 40, 40, 128, torch.bfloat16, sums=True),
    "40 heads of 128 with sums, fp32": lambda empty: _launch(empty, 40, 40, 128, torch.float32, sums=True),
    "32 over 8 heads of 128, causal, bf16": lambda empty: _launch(empty, 32, 8, 128, torch.bfloat16, causal=True),
    "24 heads of 64, fp16": lambda empty: _launch(empty, 24, 24, 64, torch.float16),
    "24 heads of 64, fp32": lambda empty: _launch(empty, 24, 24, 64, torch.float32),
    "16 heads of 256, bf16": lambda empty: _launch(empty, 16, 16, 256, torch.bfloat16, sums=True),
}
