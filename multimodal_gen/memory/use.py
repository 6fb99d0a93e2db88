"""Counters of what memory does; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MemoryUse:
    """Of one pipeline on one rank, since its start; filled by `Memory` and its mover."""

    device_bytes: int = 0  # weights on the device now
    moved_bytes: int = 0  # of weights, into the device
    stall_seconds: float = 0.0  # that computing waited for weights
    loads: int = 0  # layers and parked components brought in
    tiers: dict[str, int] = field(default_factory=dict)  # tier → bytes of weights: device, pinned, pageable, file
