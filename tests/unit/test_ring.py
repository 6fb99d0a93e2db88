"""Layers take turns in slots: what is entered is there, what is in use stays, and the forecast is right."""

from __future__ import annotations

from random import Random

import pytest

from multimodal_gen.memory.ring import Ring

pytestmark = [pytest.mark.unit]


class PlainMover:
    """Loads that end when they are waited for, some of them badly."""

    def __init__(self, random: Random, failing: float = 0.0) -> None:
        self.failing = failing  # share of the loads that fail
        self.loads: list[int] = []
        self.editions: dict[int, int] = {}  # layer → how often it was altered
        self.content: dict[int, tuple[int, int] | None] = {}  # slot → what can be computed with
        self.in_use: int | None = None
        self._random = random
        self._coming: dict[int, tuple[int, int] | None] = {}  # None: the load fails

    def load(self, slot: int, layer: int) -> None:
        """See `Mover`."""
        assert slot != self.in_use, f"slot {slot} is loaded while it is computed with"
        self.loads.append(layer)
        self.content[slot] = None
        fails = self._random.random() < self.failing
        self._coming[slot] = None if fails else (layer, self.editions.get(layer, 0))

    def wait(self, slot: int) -> float:
        """See `Mover`."""
        if slot in self._coming:
            found = self._coming.pop(slot)
            if found is None:
                raise OSError("a load failed")
            self.content[slot] = found
        return 0.0

    def done(self, slot: int) -> None:
        """See `Mover`."""
        assert self.in_use in (None, slot)
        self.in_use = None

    def drain(self) -> None:
        """See `Mover`."""
        assert self.in_use is None
        self._coming.clear()
        self.content.clear()


def enter(ring: Ring, mover: PlainMover, layer: int) -> None:
    ring.enter(layer)
    slot = ring.slot_of(layer)
    assert mover.content[slot] == (layer, mover.editions.get(layer, 0))
    mover.in_use = slot


def run(ring: Ring, mover: PlainMover, layers: range | list[int]) -> None:
    for layer in layers:
        enter(ring, mover, layer)
        ring.leave(layer)


def tracks_of(random: Random) -> dict[str, list[int]]:
    tracks: dict[str, list[int]] = {}
    for name in "abc"[: random.randint(1, 3)]:
        first = sum(map(len, tracks.values()))
        tracks[name] = list(range(first, first + random.randint(1, 8)))
    return tracks


@pytest.mark.parametrize("seed", range(200))
def test_what_is_entered_is_there_whatever_happened_before(seed):
    random = Random(seed)
    tracks = tracks_of(random)
    mover = PlainMover(random, failing=random.choice((0.0, 0.0, 0.2)))
    ring = Ring(tracks, random.randint(1, 6), mover)
    for _ in range(60):
        what, name = random.random(), random.choice(list(tracks))
        if what < 0.1:
            ring.follow(name, random.choice(list(tracks)))
        elif what < 0.2:
            altered = [layer for layer in tracks[name] if random.random() < 0.5]
            for layer in altered:
                mover.editions[layer] = mover.editions.get(layer, 0) + 1
            ring.invalidate(altered)
        elif what < 0.25:
            ring.clear()
        for layer in tracks[name]:
            try:
                enter(ring, mover, layer)
            except OSError:
                assert mover.failing
                break
            if random.random() < 0.05:
                break
            ring.leave(layer)
            if random.random() < 0.05:
                break


@pytest.mark.parametrize("slots", range(1, 6))
@pytest.mark.parametrize("count", range(1, 9))
def test_a_track_that_repeats_is_forecast_and_every_layer_moved_once_a_pass_at_most(slots, count):
    mover = PlainMover(Random(0))
    ring = Ring({"steps": range(count)}, slots, mover)
    run(ring, mover, range(count))
    for _ in range(5):
        mover.loads.clear()
        run(ring, mover, range(count))
        assert ring.misses == 1
        assert len(mover.loads) == len(set(mover.loads))
        assert count > slots or not mover.loads


@pytest.mark.parametrize("slots", range(2, 6))
def test_fetching_goes_on_from_one_track_to_the_next(slots):
    mover = PlainMover(Random(0))
    ring = Ring({"first": range(5), "empty": [], "second": range(5, 12)}, slots, mover)
    ring.follow("first", "second")
    run(ring, mover, range(12))
    assert ring.misses == 1
    ring.follow("second", "first")
    ring.follow("first", "empty")  # has nothing to fetch: the track itself again
    run(ring, mover, [*range(5), *range(5)])
    assert ring.misses == 2  # what the pass before, over the second, could not know


@pytest.mark.parametrize("slots", range(1, 6))
def test_as_many_layers_are_on_their_way_as_there_are_slots(slots):
    mover = PlainMover(Random(0))
    ring = Ring({"steps": range(20)}, slots, mover)
    for layer in range(10):
        enter(ring, mover, layer)
        assert set(mover.loads) == set(range(layer + slots)), "fetched ahead: all slots but the one in use"
        ring.leave(layer)


def test_what_failed_ahead_is_fetched_again_when_it_is_needed():
    mover = PlainMover(Random(0), failing=1.0)
    ring = Ring({"steps": range(3)}, 4, mover)
    with pytest.raises(OSError, match="a load failed"):
        ring.enter(0)
    mover.failing = 0.0  # the file is back
    run(ring, mover, range(3))


def test_a_layer_that_cannot_be_loaded_is_tried_anew_each_time():
    mover = PlainMover(Random(0), failing=1.0)
    ring = Ring({"steps": range(3)}, 2, mover)
    for attempt in range(3):
        with pytest.raises(OSError, match="a load failed"):
            ring.enter(1)
        assert mover.loads.count(1) == attempt + 1
