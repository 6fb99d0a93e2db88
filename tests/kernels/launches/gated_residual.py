"""Residuals of Z-Image 6B (a norm before, a norm after) and Wan2.2 A14B (a float32 gate; cross-attention has none)."""

from __future__ import annotations

from typing import Any

import torch

from multimodal_gen.kernels.gpu.gated_residual import gated_residual_, gated_residual_norm_
from multimodal_gen.kernels.norm_modulate import Norm
from tests.kernels.ahead import Cases, Empty


def _sandwich(empty: Empty, dtype: torch.dtype) -> Any:
    x, rows, index = empty(4128, 3840, dtype=dtype), empty(2, 3840, dtype=dtype), empty(4128, dtype=torch.int32)
    return gated_residual_norm_(x, x, rows, index, 1e-5, Norm("rms", rows, None, index, 1e-5))


def _last(empty: Empty) -> Any:
    x = empty(4128, 3840)
    return gated_residual_(x, x, empty(2, 3840), empty(4128, dtype=torch.int32), 1e-5)


def _adaptive(empty: Empty, gated: bool, dtype: torch.dtype) -> Any:
    x, rows = empty(4128, 5120, dtype=dtype), empty(2, 5120, dtype=torch.float32)
    index = empty(4128, dtype=torch.int32)
    gate = (rows, index) if gated else (None, None)
    return gated_residual_norm_(x, x, *gate, None, Norm("layer", rows, rows, index, 1e-6))


CASES: Cases = {
    "rms, rms after, 3840, bf16": lambda empty: _sandwich(empty, torch.bfloat16),
    "rms, rms after, 3840, fp32": lambda empty: _sandwich(empty, torch.float32),
    "rms, 3840, bf16": _last,
    "gate, layer after, 5120, bf16": lambda empty: _adaptive(empty, True, torch.bfloat16),
    "sum, layer after, 5120, bf16": lambda empty: _adaptive(empty, False, torch.bfloat16),
    "sum, layer after, 5120, fp32": lambda empty: _adaptive(empty, False, torch.float32),
}
