"""The mover of CPU machines: reader threads fill slots from the checkpoint's files while the processor computes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, wait

from multimodal_gen.memory.layers import Layer
from multimodal_gen.memory.readers import Readers
from multimodal_gen.memory.use import MemoryUse

READERS = 2  # one copies and merges while the other waits for the disk


class FileMover:
    """Fills slots through `WeightTree.fill`: reading, casting and merging of adapters in one go."""

    def __init__(self, layers: Mapping[int, Layer], use: MemoryUse) -> None:
        """`layers` have been put into their slots."""
        self._layers = layers
        self._use = use
        self._jobs: dict[int, list[Future[None]]] = {}  # slot → what fills it
        self._readers = Readers(READERS)

    def load(self, slot: int, layer: int) -> None:
        """See `Mover`. What is still on its way into the slot is given up."""
        self._settle(slot)
        found = self._layers[layer]
        found.clear_padding()
        self._jobs[slot] = self._readers.submit(found.weights.fill, found.keys)
        self._use.loads += 1
        self._use.moved_bytes += found.nbytes

    def wait(self, slot: int) -> float:
        """See `Mover`."""
        jobs = self._jobs.get(slot, [])
        if all(job.done() and job.exception() is None for job in jobs):
            return 0.0
        begin = time.monotonic()
        wait(jobs)  # an interrupt here leaves them where whoever fills the slot next waits for them
        for job in jobs:
            job.result()
        waited = time.monotonic() - begin
        self._use.stall_seconds += waited
        return waited

    def done(self, slot: int) -> None:
        """See `Mover`. On a CPU, what has returned has computed."""

    def drain(self) -> None:
        """See `Mover`."""
        for slot in list(self._jobs):
            self._settle(slot)

    def _settle(self, slot: int) -> None:
        wait([job for job in self._jobs.get(slot, []) if not job.cancel()])
        self._jobs.pop(slot, None)
