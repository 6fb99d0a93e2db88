"""Placeholder for development; the planner's own file takes its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Residency = Literal["resident", "streamed", "parked"]


@dataclass(frozen=True)
class Share:
    """What a component gets."""

    residency: Residency
    resident_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class MemoryPlan:
    """How the weights share the memory."""

    shares: Mapping[str, Share]
    slots: int
    slot_bytes: int
    peak_bytes: int
    limit_bytes: int | None
    host_bytes: int
    pinned_bytes: int
