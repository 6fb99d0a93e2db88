"""Tensor parallelism beside the models: a family's table says which layers its ranks share, and how.

A model is written for one device. It is constructed on the meta device, shared out here, given memory
(`weights.loading.allocate`) and filled, so that no rank ever holds the whole of a shared weight.

    table = (Rule(r".+\\.attention\\.qkv", COLUMN), Rule(r".+\\.attention\\.out", ROW), …)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from multimodal_gen.nn.foreign import ForeignEmbedding, ForeignLinear
from multimodal_gen.nn.slots import How, Slotted
from multimodal_gen.parallel.group import Group

COLUMN: Final = "column"  # each rank has its own outputs, of every part: no communication
ROW: Final = "row"  # each rank has its own inputs: the outputs are all-reduced
HEADS: Final = "heads"  # a norm over all heads: the mean square is all-reduced


@dataclass(frozen=True)
class Rule:
    """Layers whose full name matches `pattern` are shared out like this."""

    pattern: str
    how: How


def shard(model: nn.Module, table: Sequence[Rule], group: Group) -> None:
    """Share out a model on the meta device; a group of one leaves it whole. Raises: ConfigError naming both numbers."""
    layers = dict(model.named_modules())
    for rule in table:
        found = [name for name in layers if re.fullmatch(rule.pattern, name)]
        assert found, f"the table's {rule.pattern!r} matches no layer of {type(model).__name__}"
        for name in found if group.size > 1 else ():
            layer = layers[name]
            if isinstance(layer, (nn.Linear, nn.Embedding)):  # of a model that is not ours
                assert layer.weight.is_meta, "a model is shared out before it has memory"
                layer = ForeignLinear(layer) if isinstance(layer, nn.Linear) else ForeignEmbedding(layer)
                layers[name] = layer
                model.set_submodule(name, layer)
            assert isinstance(layer, Slotted), f"{name}: {type(layer).__name__} cannot be shared out"
            assert not layer.cuts, f"two rows of the table match {name}"
            layer.shard_(rule.how, group, name)
