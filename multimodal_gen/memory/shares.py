"""Plain data of memory planning: how large components are, what a user wishes, what each of them gets. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.offload import Prefetch, Residency, components, prefetch

Offload = Literal["auto", "none", "layerwise", "component"]

ONE_LAYER = Prefetch(1)
DENOISE = "denoise"  # the stage that needs its components again and again


@dataclass(frozen=True)
class Sizes:
    """One component on one rank, in bytes; filled by `Memory.add` from modules without memory."""

    name: str
    stage: str  # "encode", "denoise", "decode": when it is needed
    rest: int  # bytes outside its layers, and of layers' parameters that stay
    layers: tuple[int, ...] = ()  # bytes of each layer in the order of use; () where it has none
    tables: int = 0  # bytes of embeddings, whose rows are read from the file one by one where the component streams
    once: int = 0  # of the layers, so many at the front are run once per prompt and not in every step
    stays: tuple[
        int, ...
    ] = ()  # bytes of each layer where it stays, in the form that it is computed with; (): `layers`
    forming: int = 0  # bytes that a layer which passes through a slot takes in another form while it computes

    @cached_property
    def total(self) -> int:
        """All of it."""
        return self.rest + self.tables + sum(self.held)

    @property
    def held(self) -> tuple[int, ...]:
        """Bytes of each layer where it stays."""
        return self.stays or self.layers


@dataclass(frozen=True)
class Share:
    """What a component gets; filled by `plan`."""

    residency: Residency
    resident_layers: tuple[int, ...] = ()  # of a streamed one: indices of layers that stay, spread evenly

    def streamed(self, sizes: Sizes, begin: int = 0) -> list[int]:
        """Bytes of each layer, from `begin` on, that passes through the ring."""
        if self.residency != "streamed":
            return []
        stay = set(self.resident_layers)
        return [sizes.layers[index] for index in range(begin, len(sizes.layers)) if index not in stay]

    def held(self, sizes: Sizes) -> int:
        """Bytes that are on the device at all times, the ring left out."""
        if self.residency == "streamed":
            return sizes.rest + sum(sizes.held[index] for index in self.resident_layers)
        return sizes.total if self.residency == "resident" else 0


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything will be; filled by `plan`."""

    shares: Mapping[str, Share]
    slots: int  # of the ring; 0 where nothing streams
    slot_bytes: int
    peak_bytes: int  # weights at the worst stage + working memory
    limit_bytes: int | None
    host_bytes: int  # host tier: page cache of checkpoints on a CPU, layer images on CUDA
    pinned_bytes: int  # of host_bytes, page-locked; 0 on a CPU


@dataclass(frozen=True)
class Wishes:
    """The settings, parsed; filled by `of`."""

    offload: Offload = "auto"
    components: Mapping[str, Residency | None] = field(default_factory=dict)  # None: what `offload` says for it
    prefetch: Prefetch = ONE_LAYER
    resident_layers: int | None = None  # None: as many as fit
    device_limit: int | None = None
    host_limit: int | None = None
    pin: int | None = None  # bytes; None: at most half of the host's share

    @classmethod
    def of(cls, config: EngineConfig) -> Wishes:
        """Raises: ConfigError for text that settings made by `settings.load` do not have."""
        try:
            named, ahead = components(config.offload_components), prefetch(config.prefetch_layers)
        except ValueError as error:
            raise ConfigError(f"The offload settings cannot be read: {error}.", param="offload_components") from None
        return cls(
            offload=config.offload,
            components=named,
            prefetch=ahead,
            resident_layers=config.resident_layers,
            device_limit=config.device_memory_limit,
            host_limit=config.host_memory_limit,
            pin=config.pin_memory,
        )
