"""Embedding tables that stay in their file: a prompt needs some hundred rows of some hundred thousand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.weights.loading import WeightTree

ReadRows = Callable[[Sequence[int]], Tensor]


class RowsFromFile(nn.Module):
    """In the place of an nn.Embedding whose rows are read when they are asked for."""

    def __init__(self, read: ReadRows, device: torch.device) -> None:
        """`read`: indices → [len(indices), width] on the CPU."""
        super().__init__()
        self._read = read
        self._device = device

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] → [..., width]."""
        wanted, positions = ids.unique(return_inverse=True)
        return F.embedding(positions, self._read(wanted.tolist()).to(self._device))


def find_tables(model: nn.Module, weights: WeightTree, paths: Sequence[str]) -> dict[str, str]:
    """Path → checkpoint key of the embeddings whose rows can be read one by one: those that no ranks share."""
    found = {}
    for key, place in weights.places.items():
        for path in paths:
            if place.layer is model.get_submodule(path) and place.cut is None:
                found[path] = key
    return found
