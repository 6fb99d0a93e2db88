"""What an attention backend is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from multimodal_gen.attention.segments import Segments


class AttentionBackend(Protocol):
    """Bidirectional softmax attention inside each segment of a packed batch."""

    name: str

    @staticmethod
    def unavailable(device: torch.device) -> str:
        """Why it cannot run on this device, or an empty string."""

    @staticmethod
    def preferred(device: torch.device) -> bool:
        """Whether `auto` takes it on a device where it can run, unless an earlier row is taken."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v [T, H, D] → [T, H, D]; scale 1/√D. A segment's result does not depend on its neighbours."""
