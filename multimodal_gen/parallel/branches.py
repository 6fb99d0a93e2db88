"""Guidance branches on two groups of ranks: who computes which, and how everyone gets all of them.

A row under guidance has two branches, for the prompt and the negative prompt, which need each other only when they are
combined. Rows without guidance have one; the groups take turns with those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from multimodal_gen.errors import PeerLost
from multimodal_gen.parallel.agreement import agree
from multimodal_gen.parallel.group import Group

Pair = tuple[int, int]  # row of the batch, branch of the row
Made = TypeVar("Made")


@dataclass(frozen=True)
class BranchShare:
    """The branches of one batch, shared out; the same on every rank."""

    counts: tuple[int, ...]  # branches of each row
    group: Group
    gone: frozenset[int] = frozenset()  # rows that are not computed any further

    def without(self, rows: Iterable[int]) -> BranchShare:
        """The same, once these rows have left: nothing that stays changes hands."""
        return replace(self, gone=self.gone | set(rows))

    @cached_property
    def owners(self) -> dict[Pair, int]:
        """Who computes which, in the order of rows."""
        size, single, found = self.group.size, 0, {}
        for row, count in enumerate(self.counts):
            for branch in range(count):
                found[row, branch] = (branch if count > 1 else single) % size
            single += count == 1
        return {pair: owner for pair, owner in found.items() if pair[0] not in self.gone}

    @property
    def mine(self) -> list[Pair]:
        """What this rank computes; maybe nothing."""
        return self.of(self.group.rank)

    def of(self, rank: int) -> list[Pair]:
        """What a rank computes."""
        return [pair for pair, owner in self.owners.items() if owner == rank]

    def compute(self, work: Callable[[list[Pair]], dict[Pair, Made]]) -> dict[Pair, Made]:
        """`work(mine)`; raises on all ranks where it raised on one, which would be waited for in `exchange`.

        On a CPU, where layers may come from files that fail. A device would stand still for the vote. Raises: PeerLost.
        """
        if self.group.size == 1 or self.group.device.type != "cpu":
            return work(self.mine)
        found: dict[Pair, Made] = {}
        failure: Exception | None = None
        try:
            found = work(self.mine)
        except PeerLost:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the other branch has to learn of it
            failure = error
        agree(self.group, failure)
        return found

    def exchange(
        self, outputs: Mapping[Pair, Tensor], shapes: Sequence[torch.Size], like: Tensor
    ) -> dict[Pair, Tensor]:
        """The outputs of all ranks.

        Args:
            outputs: what this rank computed: all of `mine`.
            shapes: of each row's outputs.
            like: says dtype and device of the outputs, for a rank that has none.

        Raises: PeerLost.
        """
        if self.group.size == 1 or not self.owners:
            return dict(outputs)
        sizes = [sum(shapes[row].numel() for row, _ in self.of(rank)) for rank in range(self.group.size)]
        flat = like.new_zeros(1, max(sizes))
        if self.mine:
            flat[0, : sizes[self.group.rank]] = torch.cat([outputs[pair].flatten() for pair in self.mine])
        found: dict[Pair, Tensor] = {}
        for rank, values in enumerate(self.group.all_gather(flat)):
            start = 0
            for pair in self.of(rank):
                shape = shapes[pair[0]]
                found[pair] = values[start : start + shape.numel()].view(shape)
                start += shape.numel()
        return found
