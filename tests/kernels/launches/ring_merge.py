"""A station's share of Wan2.2 A14B (40 heads of 128)."""

from __future__ import annotations

import torch

from multimodal_gen.kernels.gpu.ring_merge import ring_merge_
from tests.kernels.ahead import Cases, Empty


def _launch(empty: Empty, dtype: torch.dtype) -> None:
    out, lse, more_lse = (empty(*shape, dtype=torch.float32) for shape in ((4128, 40, 128), (4128, 40), (4128, 40)))
    ring_merge_(out, lse, empty(4128, 40, 128, dtype=dtype), more_lse)


CASES: Cases = {
    "40 heads of 128, bf16": lambda empty: _launch(empty, torch.bfloat16),
    "40 heads of 128, fp32": lambda empty: _launch(empty, torch.float32),
}
