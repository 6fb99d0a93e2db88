"""Norms of Z-Image's VAE at 1024 x 1024: 128 channels at full size, 512 at an eighth."""

from __future__ import annotations

from typing import Any

import torch

from multimodal_gen.kernels.gpu.group_norm_silu import group_norm_silu
from tests.kernels.ahead import Cases, Empty


def _launch(empty: Empty, side: int, channels: int, dtype: torch.dtype) -> Any:
    x, weight = empty(side, side, channels, dtype=dtype), empty(channels, dtype=dtype)
    return group_norm_silu(x, weight, weight, 32, 1e-6, True, x)


CASES: Cases = {
    "128, bf16": lambda empty: _launch(empty, 1024, 128, torch.bfloat16),
    "512, bf16": lambda empty: _launch(empty, 128, 512, torch.bfloat16),
    "128, fp32": lambda empty: _launch(empty, 1024, 128, torch.float32),
}
