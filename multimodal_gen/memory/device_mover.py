"""The mover of devices with memory of their own: a courier thread brings layers from host memory into slots.

What must not meet is kept apart by events. Everything of one slot, in the order of its life:

    compute stream   … last use │                           │ next use …
                           computed ──┐               ┌── copied
    copy stream                       └→ │ copy layer │ ┘
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from torch import Tensor

from multimodal_gen.memory.device_streams import Event, Streams
from multimodal_gen.memory.host_images import HostImages
from multimodal_gen.memory.use import MemoryUse


class DeviceMover:
    """Fills slots with images of layers, in the order in which they were asked for.

    `wait` returns what the host waited, for the courier only; copies it does not wait for. `MemoryUse.stall_seconds` is
    what the device waited between two layers, whether for a copy or for the host; it is known, and added, a little
    later.
    """

    def __init__(
        self,
        slots: Sequence[Tensor],
        images: HostImages,
        streams: Streams,
        use: MemoryUse,
        courier: Executor | None = None,
    ) -> None:
        """
        Args:
            slots: uint8 on the device; what was computed before in their memory is handed over.
            courier: does one thing after the other.
        """
        self._slots = slots
        self._images = images
        self._streams = streams
        self._use = use
        self._courier = courier or ThreadPoolExecutor(1, "courier")
        self._jobs: dict[int, Future[Event]] = {}  # slot → the end of the last copy into it
        self._used: dict[int, Event] = {}  # slot → the end of its last use
        self._carried = (0, 0)  # loads and their bytes; written by the courier
        self._counted = (0, 0)  # what `MemoryUse`, which belongs to the engine's thread, has of it
        self._waits: deque[tuple[Event, Event]] = deque()  # around each wait of the stream of computing

    def load(self, slot: int, layer: int) -> None:
        """See `Mover`."""
        if slot in self._jobs:
            self._jobs[slot].cancel()  # nobody waits for it; one that has begun comes first in the stream of copies
        if slot not in self._used:
            self._used[slot] = self._streams.computed()  # its memory was somebody else's before
        self._jobs[slot] = self._courier.submit(self._bring, slot, layer, self._used[slot])

    def _bring(self, slot: int, layer: int, used: Event) -> Event:
        """In the courier's thread."""
        image = self._images.get(layer)
        self._streams.copy_after(used)
        self._streams.copy(self._slots[slot][: image.nbytes], image.memory[: image.nbytes])
        image.copied = self._streams.copied()
        loads, moved = self._carried
        self._carried = (loads + 1, moved + image.nbytes)
        return image.copied

    def wait(self, slot: int) -> float:
        """See `Mover`."""
        begin = time.monotonic()
        ready_to_compute = self._streams.computed()
        copied = self._jobs[slot].result()
        self._streams.compute_after(copied)
        self._waits.append((ready_to_compute, self._streams.computed()))
        self._count()
        return time.monotonic() - begin

    def done(self, slot: int) -> None:
        """See `Mover`."""
        self._used[slot] = self._streams.computed()

    def drain(self) -> None:
        """See `Mover`. Afterwards slots may be given other memory."""
        for job in self._jobs.values():
            job.cancel()
        last = self._courier.submit(self._streams.copied)
        self._streams.host_after(last.result())
        self._jobs.clear()
        self._used.clear()
        self._count()

    def _count(self) -> None:
        loads, moved = carried = self._carried
        self._use.loads += loads - self._counted[0]
        self._use.moved_bytes += moved - self._counted[1]
        self._counted = carried
        while self._waits:
            seconds = self._streams.seconds(*self._waits[0])
            if seconds is None:
                return
            self._use.stall_seconds += seconds
            self._waits.popleft()
