"""Norms of Wan's VAE at 832 x 480: 96 channels at full size in float32, 384 at an eighth."""

from __future__ import annotations

from typing import Any

import torch

from multimodal_gen.kernels.gpu.rms_norm_silu import rms_norm_silu
from tests.kernels.ahead import Cases, Empty


def _launch(empty: Empty, height: int, width: int, channels: int, dtype: torch.dtype) -> Any:
    x = empty(4, height, width, channels, dtype=dtype)
    return rms_norm_silu(x, empty(channels, dtype=dtype), True, x)


CASES: Cases = {
    "96, fp32": lambda empty: _launch(empty, 480, 832, 96, torch.float32),
    "384, fp32": lambda empty: _launch(empty, 60, 104, 384, torch.float32),
    "384, bf16": lambda empty: _launch(empty, 60, 104, 384, torch.bfloat16),
}
