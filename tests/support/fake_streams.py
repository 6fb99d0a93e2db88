"""A device that does what it is given late: two streams that advance by chance, out of step with the host."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from random import Random
from typing import Any

from torch import Tensor

COPY, COMPUTE = "copy", "compute"
Work = Callable[[], bool]  # False: not yet, and nothing was done


class FakeEvent:
    """A point in a stream."""

    def __init__(self) -> None:
        self.time: int | None = None  # when it happened, in pieces of work


class FakeStreams:
    """`Streams` over host memory. Copies come in two halves, so that half a layer can be seen by who is too early.

    `faults` collects what went wrong, on whatever thread: an exception would be taken for a failed load.
    """

    def __init__(self, seed: int, pins: int = 1 << 30) -> None:
        """`pins`: how often memory may be pinned before the system refuses."""
        self.faults: list[str] = []
        self.done: list[str] = []  # what was done, in this order
        self.pinned: dict[int, int] = {}  # address → bytes
        self._pins = pins
        self._random = Random(seed)
        self._lock = threading.RLock()
        self._queues: dict[str, deque[tuple[str, Work]]] = {COPY: deque(), COMPUTE: deque()}
        self._sources: list[Tensor] = []  # of copies that are not done
        self._clock = 0

    # --- Streams ------------------------------------------------------------------------------------------------

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `Streams`."""
        assert target.shape == source.shape
        middle = len(source) // 2
        with self._lock:
            self._sources.append(source)
            self._give(COPY, "half a copy", lambda: target[:middle].copy_(source[:middle]))
            self._give(COPY, "copy", lambda: (target[middle:].copy_(source[middle:]), self._forget(source)))

    def copied(self) -> FakeEvent:
        """See `Streams`."""
        return self._record(COPY)

    def computed(self) -> FakeEvent:
        """See `Streams`."""
        return self._record(COMPUTE)

    def copy_after(self, event: FakeEvent) -> None:
        """See `Streams`."""
        self._wait(COPY, event)

    def compute_after(self, event: FakeEvent) -> None:
        """See `Streams`."""
        self._wait(COMPUTE, event)

    def host_after(self, event: FakeEvent) -> None:
        """See `Streams`."""
        with self._lock:
            while event.time is None:
                progress = [self._one(name) for name in self._random.sample([COPY, COMPUTE], 2)]
                assert any(progress), "the device waits for ever"

    def seconds(self, first: FakeEvent, last: FakeEvent) -> float | None:
        """See `Streams`."""
        self.advance()
        if last.time is None:
            return None
        assert first.time is not None
        return float(last.time - first.time)

    def pin(self, memory: Tensor) -> bool:
        """See `Streams`."""
        with self._lock:
            assert memory.data_ptr() % 4096 == memory.nbytes % 4096 == 0, "pages are pinned, not bytes"
            assert memory.data_ptr() not in self.pinned
            if self._pins == 0:
                return False
            self._pins -= 1
            self.pinned[memory.data_ptr()] = memory.nbytes
            return True

    def unpin(self, memory: Tensor) -> None:
        """See `Streams`."""
        with self._lock:
            if self.reads(memory):
                self.faults.append("memory was unpinned while a copy read it")
            del self.pinned[memory.data_ptr()]

    # --- for tests ----------------------------------------------------------------------------------------------

    def compute(self, name: str, work: Callable[[], Any]) -> None:
        """Hand over computing; it is done twice, at its begin and at its end."""
        with self._lock:
            self._give(COMPUTE, f"begin {name}", work)
            self._give(COMPUTE, name, work)
        self.advance()

    def reads(self, memory: Tensor) -> bool:
        """Whether a copy from this memory is not done."""
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        with self._lock:
            return any(begin <= source.data_ptr() < end for source in self._sources)

    def advance(self) -> None:
        """Some of what was handed over is done, maybe nothing, maybe only in one stream."""
        with self._lock:
            bias = self._random.random()
            for _ in range(self._random.choice((0, 0, 1, 3, 10, 30))):
                self._one(COPY if self._random.random() < bias else COMPUTE)

    def finish(self) -> None:
        """All that was handed over is done."""
        self.host_after(self.copied())
        self.host_after(self.computed())

    def _give(self, stream: str, name: str, work: Callable[[], Any]) -> None:
        self._queues[stream].append((name, lambda: (work(), True)[1]))

    def _record(self, stream: str) -> FakeEvent:
        event = FakeEvent()
        with self._lock:
            self._give(stream, f"{stream} event", lambda: setattr(event, "time", self._clock))
        self.advance()
        return event

    def _wait(self, stream: str, event: FakeEvent) -> None:
        with self._lock:
            self._queues[stream].append((f"{stream} waited", lambda: event.time is not None))
        self.advance()

    def _one(self, stream: str) -> bool:
        queue = self._queues[stream]
        if not queue:
            return False
        name, work = queue[0]
        if not work():
            return False
        queue.popleft()
        self._clock += 1
        self.done.append(name)
        return True

    def _forget(self, source: Tensor) -> None:
        self._sources = [other for other in self._sources if other is not source]


class HostComputes(FakeStreams):
    """The same where the host computes, at once: what computing waits for, the host waits for."""

    def computed(self) -> FakeEvent:
        """See `Streams`."""
        event = super().computed()
        self.host_after(event)
        return event

    def compute_after(self, event: FakeEvent) -> None:
        """See `Streams`."""
        self.host_after(event)


class SlowCourier(Executor):
    """Does its errands in order, some time later, in the thread of whoever gives one or waits for one."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._errands: deque[tuple[Errand, Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Errand:
        """See `Executor`."""
        errand = Errand(self)
        self._errands.append((errand, lambda: fn(*args, **kwargs)))
        for _ in range(self._random.choice((0, 0, 0, 1, 2, 8))):
            self._one()
        return errand

    def run_until(self, errand: Errand) -> None:
        """An errand is done."""
        while not errand.done():
            self._one()

    def _one(self) -> None:
        if not self._errands:
            return
        errand, work = self._errands.popleft()
        if not errand.set_running_or_notify_cancel():
            return
        try:
            errand.set_result(work())
        except Exception as error:  # noqa: BLE001 - whoever waits for the errand gets it
            errand.set_exception(error)


class Errand(Future[Any]):
    """Of a `SlowCourier`."""

    def __init__(self, courier: SlowCourier) -> None:
        super().__init__()
        self._courier = courier

    def result(self, timeout: float | None = None) -> Any:
        """Waiting is when the courier works."""
        self._courier.run_until(self)
        return super().result(timeout)
