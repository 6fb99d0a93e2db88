"""Models filled from files, without a plan of where their weights are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from multimodal_gen.nn.forms import Formed
from multimodal_gen.weights.loading import Rename, WeightTree


def load_weights(
    model: nn.Module, files: Sequence[Path], renames: Sequence[Rename] = (), ignored: Sequence[str] = ()
) -> WeightTree:
    """Fill every parameter of a model that has memory. Raises: as `WeightTree`, its `verify` and its `fill`."""
    tree = WeightTree(model, files, renames, ignored)
    tree.verify()
    tree.fill(tree.places)
    return tree


def numbers_of(model: nn.Module) -> dict[str, Tensor]:
    """Name → what is computed with, also where a weight is held in another form: its product with the unit matrix."""
    found = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, Formed) and layer.packed is not None:
            unit = torch.eye(layer.weight.shape[1], dtype=layer.weight.dtype)
            with torch.inference_mode():
                found[f"{name}.weight"] = layer.packed(unit, None).T
    return found
