"""Rows of Qwen3's vocabulary (151,936) and SmolLM2's (49,152)."""

from __future__ import annotations

from typing import Any

import torch

from multimodal_gen.kernels.gpu.sampling import sample
from multimodal_gen.kernels.sampling import Wishes
from tests.kernels.ahead import Cases, Empty


def _sample(empty: Empty, rows: int, vocabulary: int) -> Any:
    wishes = Wishes(
        temperature=empty(rows, dtype=torch.float32),
        top_k=empty(rows, dtype=torch.int32),
        top_p=empty(rows, dtype=torch.float64),
        min_p=empty(rows, dtype=torch.float32),
        uniform=empty(rows, dtype=torch.float64),
    )
    return sample(empty(rows, vocabulary, dtype=torch.float32), wishes)


CASES: Cases = {
    "32 of 151936": lambda empty: _sample(empty, 32, 151_936),
    "1 of 49152": lambda empty: _sample(empty, 1, 49_152),
}
