"""Layers of models that are not ours (transformers'), so that ranks can share them and weights can have forms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.nn.linear import Linear
from multimodal_gen.nn.lowrank import Overlay, Routed, Routing
from multimodal_gen.nn.slots import Cut, Extent, How, Slotted, hollow, share
from multimodal_gen.parallel.group import SOLO, Group


class ForeignLinear(Linear):
    """In the place of nn.Linear, where nobody passes a routing."""

    def __init__(self, layer: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
        self.overlay: Overlay | None = None  # set around a forward

    def forward(self, x: Tensor, routing: Routed | None = None) -> Tensor:
        tokens = x.flatten(0, -2)
        if routing is None and self.overlay is not None:
            routing = Routing.of([len(tokens)], [self.overlay])
        return super().forward(tokens, routing).unflatten(0, x.shape[:-1])


def adopt(model: nn.Module) -> None:
    """Every nn.Linear of a model on the meta device becomes a `ForeignLinear`."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear):
            assert layer.weight.is_meta, "layers are adopted before they have memory"
            model.set_submodule(name, ForeignLinear(layer))


class ForeignEmbedding(Slotted):
    """In the place of nn.Embedding.

    Shared out by column, a rank has some of the numbers of every entry; by row, some of the entries, and the sum over
    ranks is the entry, exactly.
    """

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        self.weight = hollow(tuple(layer.weight.shape), layer.weight)
        self.first = 0  # entry held here
        self.group = SOLO  # the ranks whose outputs add up; both filled by shard_

    def extent(self, part: str | None) -> Extent:
        """All of it."""
        assert part is None, f"an embedding has no part {part!r}"
        return Extent(slice(0, self.weight.shape[0]), slice(0, self.weight.shape[1]))

    def shard_(self, how: How, group: Group, name: str) -> None:
        """Raises: ConfigError."""
        entries, width = self.weight.shape
        if how == "column":
            width = share(width, group, name)
        else:
            assert how == "row", f"{name}: an embedding is shared out by column or row, not by {how}"
            entries = share(entries, group, name)
            self.first, self.group = group.rank * entries, group
        self.weight = hollow((entries, width), self.weight)
        self.cuts = {"weight": Cut(0 if how == "row" else 1, group.rank, group.size)}

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] → [..., width]."""
        if self.group.size == 1:
            return F.embedding(ids, self.weight)
        own = ids - self.first
        held = (own >= 0) & (own < len(self.weight))
        return self.group.all_reduce_(F.embedding(own.where(held, 0), self.weight) * held[..., None])
