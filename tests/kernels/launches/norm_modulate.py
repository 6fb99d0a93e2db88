"""Norms of Z-Image 6B (width 3840, scale in the model's dtype) and Wan2.2 A14B (5120, float32 scale and shift)."""

from __future__ import annotations

from typing import Any

import torch

from multimodal_gen.kernels.gpu.norm_modulate import layer_norm_scale_shift, rms_norm_scale
from tests.kernels.ahead import Cases, Empty


def _rms(empty: Empty, dim: int, dtype: torch.dtype) -> Any:
    x, index = empty(4128, dim, dtype=dtype), empty(4128, dtype=torch.int32)
    return rms_norm_scale(x, empty(2, dim, dtype=dtype), index, 1e-5)


def _layer(empty: Empty, dim: int, dtype: torch.dtype) -> Any:
    x, rows = empty(4128, dim, dtype=dtype), empty(2, dim, dtype=torch.float32)
    return layer_norm_scale_shift(x, rows, rows, empty(4128, dtype=torch.int32), 1e-6)


CASES: Cases = {
    "rms, 3840, bf16": lambda empty: _rms(empty, 3840, torch.bfloat16),
    "rms, 3840, fp32": lambda empty: _rms(empty, 3840, torch.float32),
    "layer, 5120, bf16": lambda empty: _layer(empty, 5120, torch.bfloat16),
    "layer, 1536, fp32": lambda empty: _layer(empty, 1536, torch.float32),
}
