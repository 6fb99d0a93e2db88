"""Where weights are: how the settings are written (`--offload-components`, `--prefetch-layers`, `--pin-memory`), and
what workers tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import msgspec

from multimodal_gen.errors import did_you_mean
from multimodal_gen.units import at_least, parse_size

# On the device always; its layers pass through a ring of slots; on the device only while its stage runs.
Residency = Literal["resident", "streamed", "parked"]
RESIDENCIES: tuple[Residency, ...] = get_args(Residency)

MAX_PREFETCH = 1024  # layers; no model has as many


@dataclass(frozen=True)
class Prefetch:
    """How far the stream of layers runs ahead of the one that computes."""

    count: int
    unit: Literal["layers", "bytes"] = "layers"

    def __str__(self) -> str:
        return str(self.count) if self.unit == "layers" else at_least(self.count)


def parse_components(items: object) -> list[str]:
    """`--offload-components` in normal form. Raises: ValueError saying what is wrong."""
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise ValueError("it is a list of NAME or NAME=RESIDENCY")
    return [name if kind is None else f"{name}={kind}" for name, kind in components(items).items()]


def components(items: list[str] | tuple[str, ...]) -> Mapping[str, Residency | None]:
    """Component name → what was asked for it; None: what `--offload` says. Raises: ValueError."""
    found: dict[str, Residency | None] = {}
    for item in items:
        name, equals, word = (part.strip() for part in item.partition("="))
        if not name.isidentifier():
            raise ValueError(f"{item[:40]!r} is no NAME or NAME=RESIDENCY, as in text_encoder=parked")
        if name in found:
            raise ValueError(f"{name} is named twice")
        kind = next((kind for kind in RESIDENCIES if kind == word), None)
        if equals and kind is None:
            raise ValueError(
                f"{word[:40]!r} is none of {', '.join(RESIDENCIES)}.{did_you_mean(word, RESIDENCIES)} "
                f"Write for example {name}=streamed"
            )
        found[name] = kind
    return found


def parse_prefetch(value: object) -> str:
    """`--prefetch-layers` in normal form: layers without a unit, or a size. Raises: ValueError saying what is wrong."""
    return str(prefetch(value))


def prefetch(value: object) -> Prefetch:
    """What `--prefetch-layers` asks for. Raises: ValueError."""
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and not text.isdecimal():
        return Prefetch(parse_size(text), "bytes")
    if not isinstance(text, (str, int)) or isinstance(text, bool):
        raise ValueError("it is a number of layers, as in 2, or a size, as in 1.5GB")
    count = int(text)
    if not 0 <= count <= MAX_PREFETCH:
        raise ValueError(f"it is 0 to {MAX_PREFETCH} layers, or a size with its unit, as in 1.5GB")
    return Prefetch(count)


def parse_pin(value: object) -> int | None:
    """`--pin-memory` in bytes; None for auto. Raises: ValueError saying what is wrong."""
    return None if isinstance(value, str) and value.strip().lower() == "auto" else parse_size(value)


class WeightsPlan(msgspec.Struct, frozen=True):
    """How the weights share the memory of rank 0; settled when the model is loaded."""

    residency: dict[str, str]
    """by component: resident, streamed or parked"""
    resident_layers: dict[str, int]
    """by streamed component: layers that stay on the device"""
    slots: int
    """of the ring that streamed layers pass through; 0 where nothing is streamed"""
    slot_bytes: int
    peak_bytes: int
    """weights of the worst stage and working memory"""
    limit_bytes: int | None
    host_bytes: int
    pinned_bytes: int
    """of host_bytes, page-locked"""


class WeightsUse(msgspec.Struct, frozen=True):
    """Where the weights of rank 0 are, and what bringing them has cost since its process started."""

    device_bytes: int = 0
    pinned_bytes: int = 0
    pageable_bytes: int = 0
    file_bytes: int = 0
    """that are only in the checkpoint's files, or in the kernel's cache of them"""
    moved_bytes: int = 0
    """onto the device"""
    loads: int = 0
    """layers and components brought there"""
    stall_seconds: float = 0.0
    """that compute waited for them"""

    @property
    def tiers(self) -> dict[str, int]:
        """Bytes by where they are."""
        return {
            "device": self.device_bytes,
            "pinned": self.pinned_bytes,
            "pageable": self.pageable_bytes,
            "file": self.file_bytes,
        }
