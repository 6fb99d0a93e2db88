"""What attention is to a model, and what a backend of it is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from multimodal_gen.attention.segments import Segments


class AttentionBackend(Protocol):
    """Bidirectional softmax attention inside each segment of a packed batch."""

    name: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v [T, H, D] → [T, H, D]; scale 1/√D. A segment's result does not depend on its neighbours."""


class Candidate(AttentionBackend, Protocol):
    """A row of the registry."""

    gives_lse: bool  # whether it is an `LseBackend`, as `registry.GIVE_LSE` lists them

    @staticmethod
    def unavailable(device: torch.device) -> str:
        """Why it cannot run on this device, or an empty string."""

    @staticmethod
    def preferred(device: torch.device) -> bool:
        """Whether `auto` takes it on a device where it can run, unless an earlier row is taken."""


class LseBackend(AttentionBackend, Protocol):
    """One that can also tell how much weight its softmax gave: results over blocks of keys can be joined."""

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments) -> tuple[Tensor, Tensor]:
        """Segment i of q [T, H, D] attends to segment i of k and v [K, H, D], whose lengths are `keys`.

        Returns: [T, H, D] and the float32 natural log-sum-exp of the scaled scores [T, H]; 0 and -inf where there are
        no keys.
        """
