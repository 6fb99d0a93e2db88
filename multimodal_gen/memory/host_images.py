"""Streamed layers in host memory, each one block of bytes that is laid out like its slot: one copy brings it.

An image is made once by reading the checkpoint through the layer's recipes (cast, fused, cut, adapters merged); no
weight is in host memory twice. There are three tiers: page-locked, as far as the plan allows and the system agrees;
pageable, as far as the plan allows; and the file, from where a layer is assembled each time in one of two buffers that
take turns, while the copy from the other runs.

After a change of adapters an image is out of date; it is made again where it lies when it is next needed.
"""

from __future__ import annotations

import logging
import mmap
import sys
import weakref
from collections import deque
from collections.abc import Container, Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from multimodal_gen.memory.device_streams import Event, Streams
from multimodal_gen.memory.layers import Layer
from multimodal_gen.memory.readers import Readers

log = logging.getLogger(__name__)

Tier = Literal["pinned", "pageable", "file"]
BUFFERS = 2
READERS = 4
GOLDEN = 0.6180339887  # multiples of it, without their whole part, fill the unit interval evenly, however many


@dataclass(eq=False)
class Image:
    """Host memory with a layer in it."""

    memory: Tensor  # uint8, whole pages
    pinned: bool
    nbytes: int  # of the layer
    edition: int | None = None  # of the layer in it; None: no layer
    copied: Event | None = None  # the end of the last copy from it; filled by the mover


class HostImages:
    """The host tiers of the layers that are streamed to a device.

    `get` belongs to the courier's thread, everything else to the engine's; `make` and `drop` while the courier rests.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        pinned_bytes: int,
        host_bytes: int,
        streams: Streams,
        often: Container[int] = (),
    ) -> None:
        """
        Args:
            host_bytes: for all of this; the two buffers are made in any case.
            pinned_bytes: of `host_bytes`.
            often: layers that every step needs; they get the fastest tiers.
        """
        self.tiers = share_out({layer.number: layer.nbytes for layer in layers}, pinned_bytes, host_bytes, often)
        self._layers = {layer.number: layer for layer in layers}
        self._streams = streams
        self._editions = dict.fromkeys(self._layers, 0)
        self._images: dict[int, Image] = {}
        self._buffers: deque[Image] = deque()
        in_file = [layer.nbytes for layer in layers if not self.kept(layer)]
        self._buffer_bytes = max(in_file, default=0)
        self._pin_buffers = BUFFERS * self._buffer_bytes <= pinned_bytes
        self._refused = False
        self._readers = Readers(READERS)
        # Memory that is freed while it is pinned would stay in use until the process ends.
        weakref.finalize(self, _release, self._images, self._buffers, streams).atexit = False

    def kept(self, layer: Layer) -> bool:
        """Whether a layer has an image, so that its file is read only to make it."""
        return self.tiers[layer.number] != "file"

    def make(self) -> None:
        """Make all that is missing. Raises: as `WeightTree.fill`; it may be called again then."""
        for number, layer in self._layers.items():
            if self.kept(layer):
                self.get(number)

    def get(self, number: int) -> Image:
        """A layer as its recipes are now, or as they were when a change came meanwhile.

        Its memory stays as it is until the copy that `Image.copied` tells of has ended. Raises: as `WeightTree.fill`.
        """
        # Read before the recipes: a change while they are used makes the image out of date.
        edition = self._editions[number]
        layer = self._layers[number]
        image = self._image(layer) if self.kept(layer) else self._buffer(layer.nbytes)
        if image.edition != edition:
            if image.copied is not None:
                self._streams.host_after(image.copied)
            self._fill(image.memory[: layer.nbytes], layer)
            image.edition = edition
        return image

    def stale(self, numbers: Iterable[int]) -> None:
        """What images hold of these layers is out of date; called after their recipes are others."""
        for number in numbers:
            if number in self._editions:
                self._editions[number] += 1

    def drop(self) -> None:
        """Free all of it; what is needed again is made again."""
        _release(self._images, self._buffers, self._streams)

    def used_bytes(self) -> dict[str, int]:
        """Tier → bytes of host memory, the buffers included."""
        images = [*self._images.values(), *self._buffers]
        return {
            "pinned": sum(image.memory.nbytes for image in images if image.pinned),
            "pageable": sum(image.memory.nbytes for image in images if not image.pinned),
        }

    def _fill(self, memory: Tensor, layer: Layer) -> None:
        layer.clear_padding(memory)
        jobs = self._readers.submit(partial(layer.fill, memory), layer.keys)
        wait(jobs)  # all: nobody writes there any more when this raises
        for job in jobs:
            job.result()

    def _image(self, layer: Layer) -> Image:
        if layer.number not in self._images:
            self._images[layer.number] = self._room(layer.nbytes, self.tiers[layer.number] == "pinned")
        return self._images[layer.number]

    def _buffer(self, nbytes: int) -> Image:
        """The one whose copy is the longest ago."""
        while len(self._buffers) < BUFFERS:
            self._buffers.append(self._room(self._buffer_bytes, self._pin_buffers))
        self._buffers.rotate()
        buffer = self._buffers[0]
        buffer.edition, buffer.nbytes = None, nbytes
        return buffer

    def _room(self, nbytes: int, pin: bool) -> Image:
        # Of its own pages, which pinning asks for, and which go back to the system when it is freed.
        pages = mmap.mmap(-1, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            pages.madvise(mmap.MADV_DONTFORK)  # a child must not make the parent copy what the device reads
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        pinned = pin and not self._refused and self._readers.threads.submit(self._streams.pin, memory).result()
        if pin and not pinned and not self._refused:
            self._refused = True
            log.warning("the system page-locks no more memory for this process; the rest is copied more slowly")
        return Image(memory, pinned, nbytes)


def share_out(
    sizes: Mapping[int, int], pinned_bytes: int, host_bytes: int, often: Container[int] = ()
) -> dict[int, Tier]:
    """Layer → its tier, those that are used `often` first.

    Layers in slower tiers are spread evenly among the others, so that there is time for them; `sizes` is in the order
    of use.
    """
    if sum(sizes.values()) > host_bytes:
        buffers = BUFFERS * max(sizes.values())
        pinned_bytes, host_bytes = pinned_bytes - buffers, host_bytes - buffers
    found: dict[int, Tier] = {}
    numbers = list(sizes)
    for index in sorted(range(len(numbers)), key=lambda index: (numbers[index] not in often, index * GOLDEN % 1)):
        size = sizes[numbers[index]]
        fits = size <= host_bytes
        found[numbers[index]] = "file" if not fits else "pinned" if size <= pinned_bytes else "pageable"
        host_bytes -= size if fits else 0
        pinned_bytes -= size if found[numbers[index]] == "pinned" else 0
    return {number: found[number] for number in numbers}


def _release(images: MutableMapping[int, Image], buffers: MutableSequence[Image], streams: Streams) -> None:
    for image in (*images.values(), *buffers):
        if image.copied is not None:
            streams.host_after(image.copied)
        if image.pinned:
            streams.unpin(image.memory)
    images.clear()
    buffers.clear()
