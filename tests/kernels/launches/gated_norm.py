"""Gated norms of Mamba2-2.7B (5120 numbers; in 8 groups as its larger relatives have them)."""

from __future__ import annotations

from typing import Any

import torch

from multimodal_gen.kernels.gpu.gated_norm import gated_norm
from tests.kernels.ahead import Cases, Empty


def _launch(empty: Empty, dtype: torch.dtype, **options: Any) -> Any:
    x = empty(4096, 5120, dtype=dtype)
    return gated_norm(x, x, empty(5120, dtype=torch.float32), None, 1e-5, **options)


CASES: Cases = {
    "rms, gate first, bf16": lambda empty: _launch(empty, torch.bfloat16),
    "rms, gate first, fp32": lambda empty: _launch(empty, torch.float32),
    "layer, norm first, 8 groups, bf16": lambda empty: _launch(
        empty, torch.bfloat16, kind="layer", groups=8, order="norm_first"
    ),
}
