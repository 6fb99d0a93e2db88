"""What the adapters of one request come to, per module tree: merged into the weights, beside them, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from multimodal_gen.adapters import Pin

if TYPE_CHECKING:
    from multimodal_gen.nn.lowrank import Overlay

SetKey = tuple[tuple[str, float], ...]  # (digest, strength) in the order of addition
WeightsKey = tuple[tuple[str, SetKey], ...]  # tree → what is merged into it; trees without anything are left out


def set_key(pins: Iterable[Pin]) -> SetKey:
    """The identity of what pins of one tree do: an adapter listed twice has both strengths, strength 0 does nothing."""
    strengths: dict[str, float] = {}
    for pin in pins:
        strengths[pin.digest] = strengths.get(pin.digest, 0.0) + pin.strength
    return tuple((digest, strength) for digest, strength in strengths.items() if strength)


@dataclass(frozen=True)
class TreeUse:
    """One tree; at most one of `merged` and `beside` is not empty."""

    merged: SetKey = ()
    beside: SetKey = ()
    overlay: Overlay | None = None  # what `beside` stands for; filled when the request's first row starts


@dataclass(frozen=True)
class Applied:
    """All trees of a request; filled by `LoraManager.apply`."""

    trees: Mapping[str, TreeUse] = field(default_factory=dict)

    def overlay(self, tree: str) -> Overlay | None:
        """The unmerged adapters of a tree."""
        return self.trees[tree].overlay if tree in self.trees else None

    def key(self, *trees: str) -> tuple[tuple[SetKey, SetKey], ...]:
        """For caches of what these trees computed: equal keys, equal weights, bit for bit."""
        uses = [self.trees.get(tree, _UNUSED) for tree in trees]
        return tuple((use.merged, use.beside) for use in uses)

    @property
    def weights(self) -> WeightsKey:
        """What must be merged into the weights while rows of this request run."""
        return tuple((tree, use.merged) for tree, use in sorted(self.trees.items()) if use.merged)


_UNUSED = TreeUse()
BASE = Applied()
