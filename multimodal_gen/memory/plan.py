"""placeholder"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Residency = Literal["resident", "streamed", "parked"]


@dataclass(frozen=True)
class Sizes:
    name: str
    stage: str
    rest: int
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Share:
    residency: Residency
    resident_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class MemoryPlan:
    shares: Mapping[str, Share]
    slots: int
    slot_bytes: int
    peak_bytes: int
    limit_bytes: int | None
    host_bytes: int
    pinned_bytes: int


MODE = "none"
SLOTS = 2
HOST = 1 << 50


def wishes_of(config):
    return MODE


def plan(sizes, wishes, working, free, device):
    kind = {
        "none": lambda s: "resident",
        "layerwise": lambda s: "streamed" if s.layers else "resident",
        "component": lambda s: "parked",
    }[wishes]
    return MemoryPlan(
        {s.name: Share(kind(s)) for s in sizes}, SLOTS, max([max(s.layers, default=0) for s in sizes]), 0, None, HOST, 0
    )
