"""Adapters of ranks 16 and 64 on Qwen3-8B's fused projections (4096 to 6144), one new token per sequence."""

from __future__ import annotations

import torch

from multimodal_gen.kernels.gpu.grouped_lora import grouped_lora_
from tests.kernels.ahead import Cases, Empty


def _launch(empty: Empty, ranks: int, dtype: torch.dtype) -> None:
    x, y = empty(32, 4096, dtype=dtype), empty(32, 6144, dtype=dtype)
    down, up = empty(4096, 8 * ranks, dtype=dtype), empty(8 * ranks, 6144, dtype=dtype)
    grouped_lora_(y, x, down, up, empty(9, dtype=torch.int32), empty(32, dtype=torch.int32))


CASES: Cases = {
    "eight of rank 16, bf16": lambda empty: _launch(empty, 16, torch.bfloat16),
    "eight of rank 64, fp16": lambda empty: _launch(empty, 64, torch.float16),
    "eight of rank 16, fp32": lambda empty: _launch(empty, 16, torch.float32),
}
