"""Activations of Z-Image 6B (SwiGLU, hidden width 10240) and Wan2.2 A14B (GELU, 13824)."""

from __future__ import annotations

from typing import Any

import torch

from multimodal_gen.kernels.gpu.gated_product import gated_product, gelu_tanh_
from tests.kernels.ahead import Cases, Empty


def _swiglu(empty: Empty, dtype: torch.dtype) -> Any:
    return gated_product(*empty(4128, 20480, dtype=dtype).chunk(2, -1))


CASES: Cases = {
    "silu, 10240, bf16": lambda empty: _swiglu(empty, torch.bfloat16),
    "silu, 10240, fp32": lambda empty: _swiglu(empty, torch.float32),
    "gelu, 13824, bf16": lambda empty: gelu_tanh_(empty(4128, 13824)),
    "gelu with bias, 13824, bf16": lambda empty: gelu_tanh_(empty(4128, 13824), empty(13824)),
}
