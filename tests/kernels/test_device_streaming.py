"""Streaming to a real device; the fake one runs the same test, so that it is right before a GPU sees it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import torch

from multimodal_gen.memory.cuda_streams import CudaStreams
from multimodal_gen.memory.device_mover import DeviceMover
from multimodal_gen.memory.device_streams import Streams
from multimodal_gen.memory.host_images import HostImages
from multimodal_gen.memory.layers import make_slots
from multimodal_gen.memory.ring import Ring
from multimodal_gen.memory.use import MemoryUse
from tests.support.fake_streams import HostComputes
from tests.support.streaming import Accidents, Stack

pytestmark = [pytest.mark.kernels]

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def streams_of(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else HostComputes(0)


def keep_busy(device: torch.device) -> None:
    """So that the host runs ahead of the device."""
    if device.type == "cuda":
        torch.cuda._sleep(200_000)


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("seed", range(20))
def test_what_the_device_computes_with_is_whole_and_as_it_is_now(tmp_path: Path, seed: int, name: str) -> None:
    device, random = torch.device(name), Random(seed)
    stack, streams, use = Stack(random, tmp_path), streams_of(device), MemoryUse()
    layers = list(stack.layers.values())
    total, count = sum(layer.nbytes for layer in layers), random.randint(1, 4)
    host = random.choice((0, total // 2, total))
    images = HostImages(layers, random.choice((0, host)), host, streams)
    slots = make_slots(layers, count, device)
    ring = Ring(stack.tracks, count, DeviceMover(slots, images, streams, use))
    stack.put(ring, slots)

    def altered(numbers: list[int]) -> None:
        ring.invalidate(numbers)
        images.stale(numbers)

    def sleep() -> None:
        ring.clear()
        images.drop()

    stack.told(altered)
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def compute(number: int) -> None:
        keep_busy(device)
        for key in stack.layers[number].keys:
            wanted = stack.pristine[key] + stack.amounts[key]
            seen.append((key, stack.weights.places[key].view().clone(), wanted))

    Accidents(stack, ring, random, compute).run(15, sleep, lambda: None)
    sleep()
    assert [key for key, found, wanted in seen if not torch.equal(found.float().cpu(), wanted)] == []
    assert use.loads > 0


@NEEDS_CUDA
def test_copies_from_pinned_memory_leave_the_host_free() -> None:
    device = torch.device("cuda")
    streams = CudaStreams(device)
    memory = torch.empty(64 << 20, dtype=torch.uint8)
    pages = memory[-memory.data_ptr() % 4096 :][: 32 << 20]
    assert streams.pin(pages)
    with ThreadPoolExecutor(1) as other:  # a refusal would stay behind as an error of this thread
        assert not other.submit(streams.pin, pages).result(), "twice"
    target = torch.empty(len(pages), dtype=torch.uint8, device=device)
    begin = streams.computed()
    torch.cuda._sleep(100_000_000)
    busy = streams.computed()
    streams.copy_after(busy)
    streams.copy(target, pages)
    assert streams.seconds(begin, busy) is None, "the host did not wait"
    streams.compute_after(streams.copied())
    same = torch.equal(target.cpu(), pages)
    streams.unpin(pages)
    assert same
