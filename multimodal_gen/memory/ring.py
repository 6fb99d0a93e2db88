"""Layers that take turns in a ring of slots: what is where, and what is fetched next. No torch here.

Layer number i of a track always lives in slot i mod slots, so its tensors have one address for ever. Tracks are run
from their first layer to their last; what follows a track's last layer is known, so fetching goes on across passes, and
from one model to the next.

    slots = 3, track of 7     layer  0 1 2 3 4 5 6 0 …
                              slot   0 1 2 0 1 2 0 0 …   the last and the first share a slot: nothing is fetched there

While a layer computes, the other slots are being filled with the layers that follow. Correctness never depends on the
forecast: a layer that is not there when it is entered is fetched then, and the wait is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol


class Mover(Protocol):
    """Brings layers into slots; all methods are called from one thread."""

    def load(self, slot: int, layer: int) -> None:
        """Begin to fill a slot, after what was asked for it before. `done` has been called for its last use."""

    def wait(self, slot: int) -> float:
        """Return when the slot's last load can be computed with; seconds waited. Raises what the load raised."""

    def done(self, slot: int) -> None:
        """All work that reads the slot has been handed to the device, or has been given up."""

    def drain(self) -> None:
        """Return when no load is running; raises nothing."""


class Ring:
    """Who is in which slot."""

    def __init__(self, tracks: Mapping[str, Sequence[int]], slots: int, mover: Mover) -> None:
        """
        Args:
            tracks: name → its streamed layers in the order of use; every layer is in one track.
            slots: at least 1; all but one are for fetching ahead.
        """
        self.slots = slots
        self.misses = 0  # layers that had not been asked for when they were entered
        self._tracks = {name: tuple(layers) for name, layers in tracks.items() if layers}
        self._slot = {layer: i % slots for layers in self._tracks.values() for i, layer in enumerate(layers)}
        self._at = {layer: (name, i) for name, layers in self._tracks.items() for i, layer in enumerate(layers)}
        self._held: list[int | None] = [None] * slots  # asked for last; maybe still on its way
        self._used: int | None = None  # the slot that is computed with
        self._next: dict[str, str] = {}  # track → the one that follows, which may have no layers here
        self._mover = mover

    def slot_of(self, layer: int) -> int:
        """Where a layer lives."""
        return self._slot[layer]

    def follow(self, track: str, by: str) -> None:
        """What runs after the last layer of a track, until said otherwise; at first, the track itself again.

        Tracks without streamed layers are passed over.
        """
        self._next[track] = by

    def enter(self, layer: int) -> float:
        """Return when a layer is in its slot; seconds waited. The layer before, if it was never left, is given up.

        Raises: what loading it raised; it is loaded anew at the next attempt.
        """
        self._give_up()
        slot = self._slot[layer]
        forecast = self._held[slot] == layer
        if not forecast:
            self.misses += 1
            self._load(slot, layer)
        self._used = slot
        self._ahead(layer)  # before the wait, so that the device is never without an order
        try:
            return self._wait(slot, layer, forecast)
        except BaseException:
            self._held[slot] = None
            self._give_up()
            raise

    def _wait(self, slot: int, layer: int, forecast: bool) -> float:
        try:
            return self._mover.wait(slot)
        except Exception:
            if not forecast:
                raise
        # What failed when it was fetched ahead, maybe for a request before this one, may be there by now.
        self._load(slot, layer)
        return self._mover.wait(slot)

    def leave(self, layer: int) -> None:
        """The layer has computed."""
        self._give_up()
        self._ahead(layer)

    def invalidate(self, layers: Iterable[int]) -> None:
        """What slots hold of these layers is out of date."""
        for layer in layers:
            slot = self._slot.get(layer)
            if slot is not None and self._held[slot] == layer:
                self._held[slot] = None

    def clear(self) -> None:
        """Nothing is in any slot, and nothing on its way."""
        self._give_up()
        self._mover.drain()
        self._held = [None] * self.slots

    def _give_up(self) -> None:
        if self._used is not None:
            used, self._used = self._used, None
            self._mover.done(used)

    def _ahead(self, layer: int) -> None:
        """Ask for the layers that follow, each unless its slot is in use or belongs to one that is needed sooner."""
        claimed = {self._used}
        for following in self._following(layer):
            slot = self._slot[following]
            if slot not in claimed and self._held[slot] != following:
                self._load(slot, following)
            claimed.add(slot)

    def _following(self, layer: int) -> Iterator[int]:
        """As many layers as there are slots."""
        name, index = self._at[layer]
        for _ in range(self.slots):
            index += 1
            if index == len(self._tracks[name]):
                name, index = self._after(name), 0
            yield self._tracks[name][index]

    def _after(self, name: str) -> str:
        """The next track that has layers, past those that have none."""
        passed, following = {name}, self._next.get(name, name)
        while following not in self._tracks and following not in passed:
            passed.add(following)
            following = self._next.get(following, name)
        return following if following in self._tracks else name

    def _load(self, slot: int, layer: int) -> None:
        self._held[slot] = layer
        self._mover.load(slot, layer)
