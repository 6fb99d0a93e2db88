"""Streaming to a device: no layer is computed with before it is there, nothing is overwritten while it is read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from torch import Tensor

from multimodal_gen.memory.device_mover import DeviceMover
from multimodal_gen.memory.host_images import HostImages
from multimodal_gen.memory.layers import Layer
from multimodal_gen.memory.ring import Ring
from multimodal_gen.memory.use import MemoryUse
from tests.support.fake_streams import FakeEvent, FakeStreams, SlowCourier
from tests.support.streaming import Accidents, Stack

pytestmark = [pytest.mark.unit]

CASES = 150


class Watched(Layer):
    """Tells of images that are overwritten while a copy reads them."""

    streams: FakeStreams

    def fill(self, image: Tensor, keys: Sequence[str]) -> None:
        """See `Layer`."""
        if self.streams.reads(image):
            self.streams.faults.append(f"an image of layer {self.number} was overwritten while a copy read it")
        super().fill(image, keys)


class Scene:
    """A stack that is streamed to a device, all of its numbers drawn by chance."""

    def __init__(
        self, seed: int, folder: Path, streams: type[FakeStreams] = FakeStreams, threads: bool = False
    ) -> None:
        random = self.random = Random(seed)
        device = self.streams = streams(seed, pins=random.choice((0, 1, 3, 1 << 30)))

        class WatchedHere(Watched):
            streams = device

        self.stack = Stack(random, folder, WatchedHere)
        count = random.randint(1, 5)
        self.slots = self.stack.slots(count)
        total = sum(layer.nbytes for layer in self.stack.layers.values())
        host = random.choice((0, random.randint(0, total), total))
        layers = list(self.stack.layers.values())
        self.images = HostImages(layers, random.randint(0, host), host, device)
        self.use = MemoryUse()
        courier = None if threads else SlowCourier(seed)
        mover = DeviceMover(self.slots, self.images, device, self.use, courier)
        self.ring = Ring(self.stack.tracks, count, mover)
        self.stack.put(self.ring, self.slots)
        self.stack.told(self._altered)
        if random.random() < 0.5:
            self.images.make()

    def run(self, passes: int) -> Accidents:
        accidents = Accidents(self.stack, self.ring, self.random, self._compute)
        accidents.run(passes, self._sleep, self._wake)
        self.ring.clear()
        self.images.drop()
        self.streams.finish()
        assert not self.streams.pinned
        return accidents

    def _compute(self, number: int) -> None:
        check = self.stack.check(number)
        self.streams.compute(f"layer {number}", lambda: self._note(check()))

    def _note(self, fault: str | None) -> None:
        if fault is not None:
            self.streams.faults.append(fault)

    def _altered(self, numbers: list[int]) -> None:
        self.ring.invalidate(numbers)
        self.images.stale(numbers)

    def _sleep(self) -> None:
        self.ring.clear()
        self.streams.host_after(self.streams.computed())  # as freeing memory of a device does
        for slot in self.slots:
            slot.fill_(0x55)
        self.streams.finish()
        if any((slot != 0x55).any() for slot in self.slots):
            self.streams.faults.append("a copy came after its slot was given away")
        self.images.drop()

    def _wake(self) -> None:
        # Whoever had the slots' memory meanwhile still computes in it.
        self.streams.compute("somebody else", lambda: [slot.fill_(0x55) for slot in self.slots])
        if self.random.random() < 0.5:
            self.images.make()


@pytest.mark.parametrize("seed", range(CASES))
def test_computing_sees_every_layer_whole_and_as_it_is_now(tmp_path, seed):
    scene = Scene(seed, tmp_path)
    scene.run(passes=25)
    assert not scene.streams.faults


def test_accidents_do_happen(tmp_path):
    failures = 0
    for seed in range(20):
        (tmp_path / str(seed)).mkdir()
        failures += Scene(seed, tmp_path / str(seed)).run(passes=25).failures
    assert failures > 10


@pytest.mark.parametrize("seed", range(25))
def test_a_courier_in_its_own_thread_changes_nothing(tmp_path, seed):
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        scene = Scene(1000 + seed, tmp_path, threads=True)
        scene.run(passes=25)
    finally:
        sys.setswitchinterval(before)
    assert not scene.streams.faults


# --- the tests would see it ---------------------------------------------------------------------------------------


class CopiesTooEarly(FakeStreams):
    def copy_after(self, event: FakeEvent) -> None:
        pass


class ComputesTooEarly(FakeStreams):
    def compute_after(self, event: FakeEvent) -> None:
        pass


class HostTooEarly(FakeStreams):
    def host_after(self, event: FakeEvent) -> None:
        self.advance()

    def finish(self) -> None:
        super().host_after(self.copied())
        super().host_after(self.computed())


@pytest.mark.parametrize("broken", [CopiesTooEarly, ComputesTooEarly, HostTooEarly])
def test_a_wait_that_is_left_out_is_noticed(tmp_path, broken):
    noticed = 0
    for seed in range(20):
        (tmp_path / str(seed)).mkdir()
        scene = Scene(seed, tmp_path / str(seed), broken)
        scene.run(passes=25)
        noticed += bool(scene.streams.faults)
    assert noticed >= 3
