"""Blocks of attention from two ranks (Wan2.2 A14B: 40 heads of 128)."""

from __future__ import annotations

import torch

from multimodal_gen.kernels.gpu.ring_merge import ring_merge_
from tests.kernels.ahead import Cases, Empty


def _launch(empty: Empty, dtype: torch.dtype) -> None:
    lse = empty(4096, 40, dtype=torch.float32)
    ring_merge_(empty(4096, 40, 128, dtype=torch.float32), lse, empty(4096, 40, 128, dtype=dtype), lse)


CASES: Cases = {
    "bf16": lambda empty: _launch(empty, torch.bfloat16),
    "fp32": lambda empty: _launch(empty, torch.float32),
}
