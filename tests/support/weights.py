"""Models filled from files, without a plan of where their weights are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from multimodal_gen.weights.loading import Rename, WeightTree


def load_weights(
    model: nn.Module, files: Sequence[Path], renames: Sequence[Rename] = (), ignored: Sequence[str] = ()
) -> WeightTree:
    """Fill every parameter of a model that has memory. Raises: as `WeightTree`, its `verify` and its `fill`."""
    tree = WeightTree(model, files, renames, ignored)
    tree.verify()
    tree.fill(tree.places)
    return tree
