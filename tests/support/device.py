"""Where the comparisons with reference implementations run: `TEST_DEVICE=cuda pytest tests/parity` on a GPU.

The references stay on the CPU. Sums in another order round otherwise, and the differences of tiny random models grow
from step to step: tolerances are ten times as wide there. TensorFloat-32 is off.
"""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"

if not ON_CPU:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def within(tolerance: float) -> float:
    """A tolerance of float32 on the CPU, on this device."""
    return tolerance if ON_CPU else 10 * tolerance
