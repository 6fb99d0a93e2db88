"""Streaming from files on a CPU: what is computed with is whole and as it is now, whatever happens on the way."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch

from multimodal_gen.errors import AdapterError
from multimodal_gen.memory.file_mover import FileMover
from multimodal_gen.memory.ring import Ring
from multimodal_gen.memory.use import MemoryUse
from multimodal_gen.weights.loading import Change
from tests.support.streaming import Accidents, Stack

pytestmark = [pytest.mark.unit]


@pytest.fixture
def moody_disk(monkeypatch):
    """A disk that takes its time now and then."""
    random, read = Random(0), os.preadv

    def preadv(*args):
        if random.random() < 0.1:
            time.sleep(random.random() / 1000)
        return read(*args)

    monkeypatch.setattr(os, "preadv", preadv)


class Scene:
    """A stack that is streamed from its file, all of its numbers drawn by chance."""

    def __init__(self, seed: int, folder: Path) -> None:
        random = Random(seed)
        stack = self.stack = Stack(random, folder)
        count = random.randint(1, 5)
        self.slots = stack.slots(count)
        self.use = MemoryUse()
        self.ring = Ring(stack.tracks, count, FileMover(stack.layers, self.use))
        stack.put(self.ring, self.slots)
        stack.told(self.ring.invalidate)
        self.faults: list[str] = []
        self.accidents = Accidents(stack, self.ring, random, self._compute)

    def _compute(self, number: int) -> None:
        check = self.stack.check(number)
        self.faults += filter(None, (check(), time.sleep(0.0002), check()))

    def sleep(self) -> None:
        self.ring.clear()
        for slot in self.slots:
            slot.fill_(0x55)

    def wake(self) -> None:
        if any((slot != 0x55).any() for slot in self.slots):
            self.faults.append("something was read into a slot that had been given away")


@pytest.mark.parametrize("seed", range(60))
def test_computing_sees_every_layer_whole_and_as_it_is_now(tmp_path, moody_disk, seed):
    scene = Scene(seed, tmp_path)
    scene.accidents.run(12, scene.sleep, scene.wake)
    assert not scene.faults
    assert scene.use.loads > 0


@dataclass(frozen=True)
class Slow:
    """A recipe that takes its time."""

    whole: bool = False

    def begin(self, device: torch.device, dtype: torch.dtype) -> Change:
        """See `Recipe`."""

        def change(rows: slice, pristine: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return pristine + 100

        return change


@dataclass(frozen=True)
class Failing:
    """A recipe that cannot be followed."""

    whole: bool = False

    def begin(self, device: torch.device, dtype: torch.dtype) -> Change:
        """See `Recipe`."""
        raise AdapterError("The adapters overflow.")


def test_what_half_failed_has_ended_before_its_slot_is_filled_again(tmp_path):
    scene = Scene(1, tmp_path)
    stack, mover = scene.stack, FileMover(scene.stack.layers, scene.use)
    for layer in stack.layers.values():
        layer.put(scene.slots[0])
    first, second = stack.layers[0], stack.layers[1]
    stack.weights.alter({first.keys[0]: Failing(), first.keys[1]: Slow()}, {*first.keys[:2]})
    mover.load(0, 0)
    with pytest.raises(AdapterError):
        mover.wait(0)
    mover.load(0, 1)
    mover.wait(0)
    time.sleep(0.1)
    assert second.number == 1
    assert stack.check(1)() is None
