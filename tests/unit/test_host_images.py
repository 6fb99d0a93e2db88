"""Layers in host memory: in which tier, made when, from what, and freed when."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

import pytest
import torch

from multimodal_gen.errors import CorruptModel
from multimodal_gen.memory.device_mover import DeviceMover
from multimodal_gen.memory.host_images import HostImages, share_out
from multimodal_gen.memory.use import MemoryUse
from multimodal_gen.weights.loading import Change, WeightTree
from tests.support.fake_streams import FakeStreams
from tests.support.streaming import Shift, Stack

pytestmark = [pytest.mark.unit]


@pytest.fixture
def stack(tmp_path) -> Stack:
    made = Stack(Random(20), tmp_path)
    assert len(made.layers) > 10
    slots = made.slots(len(made.layers))
    for number, layer in made.layers.items():
        layer.put(slots[number])
    return made


@pytest.fixture
def streams() -> Iterator[FakeStreams]:
    found = FakeStreams(0)
    yield found
    assert not found.faults


def total(stack: Stack) -> int:
    return sum(layer.nbytes for layer in stack.layers.values())


def images_of(stack: Stack, streams: FakeStreams, pinned: int, host: int) -> HostImages:
    return HostImages(list(stack.layers.values()), pinned, host, streams)


# --- tiers ------------------------------------------------------------------------------------------


def test_what_fits_is_pinned_then_pageable_and_the_rest_stays_in_its_file():
    sizes = dict.fromkeys(range(40), 10)
    tiers = list(share_out(sizes, pinned_bytes=130, host_bytes=250).values())
    # Two buffers for what stays in the file are part of both budgets.
    assert (tiers.count("pinned"), tiers.count("pageable"), tiers.count("file")) == (11, 12, 17)


def test_all_is_pinned_where_all_fits():
    assert set(share_out({0: 10, 1: 7}, 17, 17).values()) == {"pinned"}
    assert set(share_out({0: 10, 1: 7}, 0, 17).values()) == {"pageable"}
    assert set(share_out({0: 10, 1: 7}, 0, 0).values()) == {"file"}
    assert share_out({}, 0, 0) == {}


@pytest.mark.parametrize("in_file", range(3, 40, 4))
def test_slow_layers_are_spread_among_the_others(in_file):
    buffers = 20
    tiers = list(share_out(dict.fromkeys(range(40), 10), 0, 10 * (40 - in_file) + buffers).values())
    assert tiers.count("file") == in_file
    longest = max(len(run) for run in runs(tiers))
    assert longest <= 2 * -(-in_file // (40 - in_file)), tiers


def test_what_every_step_needs_has_the_fastest_tiers():
    tiers = share_out(dict.fromkeys(range(30), 10), 120, 220, often=range(20, 30))
    assert {tiers[number] for number in range(20, 30)} == {"pinned"}
    assert list(tiers.values()).count("pageable") == 10


def runs(tiers: list[str]) -> Iterator[list[str]]:
    """Stretches of layers in a row that stay in the file."""
    found: list[str] = []
    for tier in [*tiers, "end"]:
        if tier == "file":
            found.append(tier)
        elif found:
            yield found
            found = []


def test_budgets_are_kept_and_reported(stack, streams):
    images = images_of(stack, streams, total(stack) // 3, total(stack) * 2 // 3)
    images.make()
    used = images.used_bytes()
    assert used["pinned"] == sum(streams.pinned.values()) > 0
    kept = [layer for layer in stack.layers.values() if images.kept(layer)]
    pinned = [layer for layer in kept if images.tiers[layer.number] == "pinned"]
    assert sum(layer.nbytes for layer in pinned) <= total(stack) // 3
    assert sum(layer.nbytes for layer in kept) <= total(stack) * 2 // 3
    images.drop()
    assert set(images.used_bytes().values()) == {0}
    assert not streams.pinned


def test_a_system_that_refuses_to_pin_is_asked_once_and_heard(stack, caplog):
    streams = FakeStreams(0, pins=2)
    images = images_of(stack, streams, total(stack), total(stack))
    with caplog.at_level(logging.WARNING):
        for number in stack.layers:
            images.get(number)
    assert len(streams.pinned) == 2
    assert images.used_bytes()["pageable"] > 0
    assert [record.message for record in caplog.records] == [
        "the system page-locks no more memory for this process; the rest is copied more slowly"
    ]
    images.drop()


# --- content ------------------------------------------------------------------------------------------


def test_an_image_is_byte_for_byte_what_reading_into_the_slot_gives(stack, streams):
    stack.alter(Random(3))
    images = images_of(stack, streams, 0, total(stack))
    images.make()
    for number, layer in stack.layers.items():
        layer.clear_padding()
        stack.weights.fill(layer.keys)
        image = images.get(number).memory
        for spot in layer.spots:
            slot = spot.owner.get_parameter(spot.name).detach().reshape(-1).view(torch.uint8)
            assert torch.equal(image[spot.begin : spot.begin + spot.like.nbytes], slot), (number, spot.name)


def test_an_image_is_read_once_and_again_in_place_after_a_change(stack, streams, monkeypatch):
    reads: list[str] = []
    fill = WeightTree.fill

    def noted(self, keys, **options):
        reads.extend(keys)
        fill(self, keys, **options)

    monkeypatch.setattr(WeightTree, "fill", noted)
    images = images_of(stack, streams, 0, total(stack))
    stack.told(images.stale)
    images.make()
    before = {number: images.get(number).memory.data_ptr() for number in stack.layers}
    assert sorted(reads) == sorted(stack.pristine)
    keys = set(stack.layers[1].keys)
    stack.weights.alter(dict.fromkeys(keys, Shift(5)), keys)
    images.make()
    assert {number: images.get(number).memory.data_ptr() for number in stack.layers} == before
    assert sorted(reads[len(stack.pristine) :]) == sorted(keys), "the layer that was altered, once"


@dataclass(frozen=True)
class Meddling:
    """A recipe during which the adapters are changed."""

    stack: Stack
    key: str
    whole: bool = False

    def begin(self, device: torch.device, dtype: torch.dtype) -> Change:
        """See `Recipe`."""

        def change(rows: slice, pristine: torch.Tensor) -> torch.Tensor:
            self.stack.weights.alter({self.key: Shift(7)}, {self.key})
            return pristine + 1

        return change


def test_a_change_while_an_image_is_made_is_not_lost(stack, streams):
    images = images_of(stack, streams, 0, total(stack))
    stack.told(images.stale)
    key = stack.layers[0].keys[0]
    stack.weights.alter({key: Meddling(stack, key)}, {key})
    images.get(0)
    image = images.get(0)
    stack.amounts[key] = 7
    for spot in stack.layers[0].spots:
        slot = spot.owner.get_parameter(spot.name).detach().reshape(-1).view(torch.uint8)
        slot.copy_(image.memory[spot.begin : spot.begin + spot.like.nbytes])
    assert stack.check(0)() is None


def test_files_that_cannot_be_read_are_named_and_the_next_attempt_goes_on(stack, streams):
    images = images_of(stack, streams, 0, total(stack) // 2)
    away = stack.file.rename(stack.file.with_suffix(".away"))
    with pytest.raises(CorruptModel, match=r"model\.safetensors cannot be read"):
        images.make()
    away.rename(stack.file)
    images.make()
    assert images.used_bytes()["pageable"] > 0


# --- beside copies ------------------------------------------------------------------------------------------


class Stuck(FakeStreams):
    """A device that does nothing until somebody waits for it."""

    def advance(self) -> None:
        """Nothing."""


def test_a_layer_is_assembled_while_the_copy_of_the_one_before_runs(stack):
    streams = Stuck(0)
    images = images_of(stack, streams, 0, 0)
    slot = torch.empty(max(layer.nbytes for layer in stack.layers.values()), dtype=torch.uint8)
    ended = []
    for number in range(4):
        image = images.get(number)
        ended.append(streams.done.count("copy"))
        streams.copy(slot[: image.nbytes], image.memory[: image.nbytes])
        image.copied = streams.copied()
    assert ended == [0, 0, 1, 2], "the third needs the first one's buffer"


def test_memory_is_unpinned_after_the_last_copy_even_when_nobody_drops_it(stack):
    streams = Stuck(0)
    images = images_of(stack, streams, total(stack), total(stack))
    image = images.get(0)
    streams.copy(torch.empty(image.nbytes, dtype=torch.uint8), image.memory[: image.nbytes])
    image.copied = streams.copied()
    assert streams.reads(image.memory)
    assert streams.pinned
    del image, images
    gc.collect()
    assert not streams.pinned
    assert not streams.faults


def test_a_load_that_another_one_follows_into_its_slot_is_given_up(stack):
    streams, use, go = FakeStreams(0), MemoryUse(), threading.Event()
    images = images_of(stack, streams, 0, total(stack))
    with ThreadPoolExecutor(1) as courier:
        courier.submit(go.wait)
        mover = DeviceMover(stack.slots(2), images, streams, use, courier)
        for number in range(4):
            mover.load(0, number)
        mover.load(1, 4)
        go.set()
        mover.wait(0)
        mover.wait(1)
    assert use.loads == 2


def test_draining_gives_up_what_has_not_begun(stack):
    streams, use, go = FakeStreams(0), MemoryUse(), threading.Event()
    images = images_of(stack, streams, 0, total(stack))
    slots = stack.slots(4)
    with ThreadPoolExecutor(1) as courier:
        courier.submit(go.wait)
        mover = DeviceMover(slots, images, streams, use, courier)
        for number in range(4):
            mover.load(number, number)
        threading.Timer(0.05, go.set).start()
        mover.drain()
    assert use.loads == 0


def test_stall_is_what_the_stream_of_computing_waited(stack):
    streams, use = FakeStreams(0), MemoryUse()
    images = images_of(stack, streams, 0, total(stack))
    mover = DeviceMover(stack.slots(1), images, streams, use)
    for number in range(3):
        mover.load(0, number)
        mover.wait(0)
        mover.done(0)
    streams.finish()
    mover.wait(0)  # once more, for a layer that is there
    assert use.stall_seconds > 0
    assert use.loads == 3
    assert use.moved_bytes == sum(stack.layers[number].nbytes for number in range(3))
    mover.drain()
