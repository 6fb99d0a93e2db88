"""The table between tokens and vectors, in both directions; ranks share its entries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.nn.linear import Packed, linear
from multimodal_gen.nn.slots import Cut, Extent, How, Slotted, hollow, share
from multimodal_gen.parallel.group import SOLO, Group


class Vocabulary(Slotted):
    """One vector per token. As an embedding it looks vectors up; as an output layer it multiplies with all of them."""

    def __init__(self, entries: int, width: int, *, embeds: bool) -> None:
        """`embeds`: vectors are looked up, so the weight stays when it is packed."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(entries, width), requires_grad=False)
        self.first = 0  # entry held here
        self.group = SOLO  # the ranks that hold the others; both filled by shard_
        self.packed: Packed | None = None  # multiplied with instead of the weight; filled by whoever packed it
        self.embeds = embeds

    def extent(self, part: str | None) -> Extent:
        """All of it."""
        assert part is None, f"a vocabulary has no part {part!r}"
        return Extent(slice(0, self.weight.shape[0]), slice(0, self.weight.shape[1]))

    def shard_(self, how: How, group: Group, name: str) -> None:
        """By entries. Raises: ConfigError."""
        assert how == "row", f"{name}: a vocabulary is shared out by its entries, not by {how}"
        entries = share(self.weight.shape[0], group, name)
        self.first, self.group = group.rank * entries, group
        self.weight = hollow((entries, self.weight.shape[1]), self.weight)
        self.cuts = {"weight": Cut(0, group.rank, group.size)}

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [T] → [T, width]."""
        if self.group.size == 1:
            return F.embedding(ids, self.weight)
        own = ids - self.first
        held = (own >= 0) & (own < len(self.weight))
        return self.group.all_reduce_(F.embedding(own.where(held, 0), self.weight) * held[..., None])

    def logits(self, x: Tensor) -> Tensor:
        """x [R, width] → float32 [R, entries of all ranks]."""
        y = linear(x, self.weight, None) if self.packed is None else self.packed(x, None)
        if self.group.size > 1:
            y = self.group.all_gather(y).unflatten(0, (self.group.size, -1)).transpose(0, 1).flatten(1)
        return y.float()
