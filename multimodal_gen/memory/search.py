"""All ways to place the components that the wishes allow, what each of them needs, and what it costs. No torch here.

A way is a share for every component. Its cost is the bytes that move to the device for a typical request, so that the
cheapest way that fits is the plan: nothing moves where everything fits; what is used once per request leaves the device
before what every step needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from multimodal_gen.errors import ConfigError
from multimodal_gen.memory.shares import DENOISE, Share, Sizes, Wishes
from multimodal_gen.offload import Residency
from multimodal_gen.units import at_least, size

STEPS = 20  # denoising steps of a typical request
# Forwards of a text encoder per request. A GPU streams the layers from RAM for prompt and negative prompt each; a CPU
# finds the file that it has just read in the page cache.
TEXTS = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class Way:
    """One way to place everything."""

    shares: Mapping[str, Share]
    slots: int
    slot_bytes: int
    weights: int  # bytes on the device at the worst stage, the ring included
    peak: int  # with the work of the stages
    cost: int  # bytes to the device for a typical request

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller is better."""
        return self.cost, self.peak


class Search:
    """The components of one rank under some wishes."""

    def __init__(self, sizes: Sequence[Sizes], wishes: Wishes, working: Mapping[str, int], kind: str) -> None:
        """`kind`: "cpu" or "cuda"."""
        self.sizes, self.wishes, self.working, self.kind = tuple(sizes), wishes, working, kind
        self.bare = any(residency is None for residency in wishes.components.values())

    def needs(self, way: Way) -> int:
        """What must be within the limit. Who wants all on the device has the weights there, and sees about the work."""
        return way.weights if self.wishes.offload == "none" else way.peak

    def best(self, limit: int) -> Way | None:
        """The cheapest way that is within `limit`, with what room is left given to encoders; None where there is none.

        Raises: ConfigError where something has to stream and the prefetch is too small for a layer of it.
        """
        found = self.cheapest(limit)
        return found and self._fill_encoders(found, limit)

    def cheapest(self, limit: int) -> Way | None:
        """As `best`, with encoders resident or without resident layers."""
        ways = list(self.ways())
        if not ways:
            raise self._prefetch_too_small()
        return min((way for way in ways if self.needs(way) <= limit), key=lambda way: way.rank, default=None)

    def smallest(self) -> Way:
        """The way that needs least."""
        return min(self.ways(), key=self.needs)

    def ways(self) -> Iterator[Way]:
        """Every way that the wishes allow; encoders stream without resident layers."""
        for kinds in product(*(self.allowed(part) for part in self.sizes)):
            residencies = {part.name: kind for part, kind in zip(self.sizes, kinds, strict=True)}
            if not self._transformers_agree(residencies):
                continue
            depth = self._slots(residencies)
            if depth is None:
                continue
            for counts in self._resident_counts(residencies, depth):
                shares = {p.name: self._share(p, residencies[p.name], counts.get(p.name, 0)) for p in self.sizes}
                yield self._way(shares, depth)

    def allowed(self, part: Sizes) -> tuple[Residency, ...]:
        """What may become of one component."""
        asked = self.wishes.components.get(part.name)
        if asked is not None:
            return (asked,)
        if self.wishes.offload == "none" or (self.bare and part.name not in self.wishes.components):
            return ("resident",)
        if self.wishes.offload == "component":
            return ("parked",)
        if self.wishes.offload == "layerwise":
            return ("streamed",) if part.layers else ("resident",)
        if part.stage == DENOISE and part.layers:
            return ("resident", "streamed")
        return ("resident", "parked", "streamed") if part.layers else ("resident", "parked")

    def _transformers_agree(self, residencies: Mapping[str, Residency]) -> bool:
        """Two experts take turns: halves of both on the device serve every step, all of one serves half of them."""
        free = [p for p in self.sizes if p.stage == DENOISE and len(self.allowed(p)) > 1 and p.layers]
        return len({residencies[part.name] for part in free}) < 2

    def _slots(self, residencies: Mapping[str, Residency]) -> int | None:
        """Slots that the prefetch asks for; 0 where nothing streams, None where it is too small for a layer."""
        largest = max((max(p.layers) for p in self.sizes if residencies[p.name] == "streamed"), default=0)
        ahead = self.wishes.prefetch
        if not largest or ahead.unit == "layers":
            return 1 + ahead.count if largest else 0
        return None if 0 < ahead.count < largest else 1 + ahead.count // largest

    def _prefetch_too_small(self) -> ConfigError:
        largest = max(max(part.layers) for part in self.sizes if part.layers and "streamed" in self.allowed(part))
        return ConfigError(
            f"--prefetch-layers {self.wishes.prefetch} is less than one layer, and the largest that would be streamed "
            f"has {size(largest)}: say {at_least(largest)}, or 0 for no prefetch.",
            param="prefetch_layers",
        )

    def _resident_counts(self, residencies: Mapping[str, Residency], depth: int) -> Iterator[dict[str, int]]:
        """How many layers of each streamed transformer stay."""
        streamed = [p for p in self.sizes if p.stage == DENOISE and residencies[p.name] == "streamed"]
        fixed = {part.name: self._wanted(part) for part in streamed}
        choices = [
            sorted({count, count + _wraps(part, self._share(part, "streamed", count), depth)})
            for part in streamed
            if (count := fixed[part.name]) is not None
        ]
        filled = [part for part in streamed if fixed[part.name] is None]
        total = sum(len(part.layers) for part in filled)
        for counts in product(*choices):
            given = dict(zip((p.name for p in streamed if fixed[p.name] is not None), counts, strict=True))
            for stay in range(total) if filled else (0,):
                yield {**given, **{part.name: stay * len(part.layers) // total for part in filled}}

    def _wanted(self, part: Sizes) -> int | None:
        """Layers that are to stay; None: as many as fit."""
        if self.wishes.resident_layers is not None:
            return min(self.wishes.resident_layers, len(part.layers))
        return None if self._may_fill(part) else 0

    def _may_fill(self, part: Sizes) -> bool:
        """Whether layers stay because there is room. Who asks for streaming wants memory back, up to a limit if any."""
        return len(self.allowed(part)) > 1 or self.wishes.device_limit is not None

    def _share(self, part: Sizes, kind: Residency, resident: int) -> Share:
        if kind != "streamed":
            return Share(kind)
        if resident >= len(part.layers):
            return Share("resident")
        # Those of every step first; what runs once per prompt stays where there is room beyond.
        steps = len(part.layers) - part.once
        front = max(0, resident - steps)
        return Share(kind, (*_spread(front, 0, part.once), *_spread(resident - front, part.once, steps)))

    def _way(self, shares: Mapping[str, Share], depth: int) -> Way:
        passing = {part.name: shares[part.name].streamed(part) for part in self.sizes}
        slots = min(depth, max(map(len, passing.values()), default=0))
        slot_bytes = max((max(layers) for layers in passing.values() if layers), default=0)
        forming = max((part.forming for part in self.sizes if passing[part.name]), default=0)
        held = sum(shares[part.name].held(part) for part in self.sizes) + slots * slot_bytes + forming
        guests: dict[str, int] = {}
        for part in self.sizes:
            if shares[part.name].residency == "parked":
                guests[part.stage] = max(guests.get(part.stage, 0), part.total)
        stages = guests.keys() | self.working.keys()
        worst = max((guests.get(stage, 0) + self.working.get(stage, 0) for stage in stages), default=0)
        cost = sum(self._cost(part, shares[part.name], passing[part.name], slots) for part in self.sizes)
        return Way(shares, slots, slot_bytes, held + max(guests.values(), default=0), held + worst, cost)

    def _cost(self, part: Sizes, share: Share, passing: Sequence[int], slots: int) -> int:
        """Bytes that move to the device for one component and a typical request."""
        times = STEPS if part.stage == DENOISE else 1
        if share.residency == "parked":
            return part.total * times
        if times == 1:
            return sum(passing) * TEXTS[self.kind]
        # The first layer of the next step has to wait for the slot of the last one: as bad as one layer more, and worse
        # where copies hide behind compute.
        lost = max(passing) + 1 if _wraps(part, share, slots) else 0
        every = sum(share.streamed(part, part.once))
        return (every + lost) * times + (sum(passing) - every) * TEXTS[self.kind]

    def _fill_encoders(self, way: Way, limit: int) -> Way:
        """Layers of streamed encoders stay where there is room after all."""
        for part in self.sizes:
            share = way.shares[part.name]
            if share.residency != "streamed" or part.stage == DENOISE or not self._may_fill(part):
                continue
            depth = self._slots({name: other.residency for name, other in way.shares.items()})
            assert depth is not None, "this way has been found"
            for count in range(len(part.layers), 0, -1):
                fuller = self._way({**way.shares, part.name: self._share(part, "streamed", count)}, depth)
                if self.needs(fuller) <= limit and fuller.rank < way.rank:
                    way = fuller
                    break
        return way


def _wraps(part: Sizes, share: Share, slots: int) -> bool:
    """Whether the last layer of a step has the slot of the first, which then cannot be fetched ahead."""
    return slots > 1 and len(share.streamed(part, part.once)) % slots == 1


def _spread(count: int, begin: int, among: int) -> Iterator[int]:
    """So many of the layers from `begin` on, evenly."""
    return (begin + i * among // count for i in range(count))
