"""The ranks of one replica as their front sees them: they start together, and none outlives another.

Rank 0 speaks for the group. The others have a channel, too, over which they tell only that they cannot load; that it
closes is how their death is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from multimodal_gen.engine.channel import ChannelClosed
from multimodal_gen.errors import WorkerCrashed
from multimodal_gen.messages import FromWorker, Load, LoadFailed, decode_from_worker

WATCH_SECONDS = 1.0
DUMP_SECONDS = 0.3  # for a rank to write the stacks of its threads

log = logging.getLogger(__name__)


class Worker(Protocol):
    """One rank, wherever it runs."""

    @property
    def pid(self) -> int:
        """Process id, on the machine where it runs."""

    def send(self, message: object) -> None:
        """Queue a message; one to a dead worker is lost."""

    async def frame(self) -> bytes:
        """The next message's bytes. Raises: ChannelClosed once it has died."""

    def dump(self) -> None:
        """Have it write the stacks of its threads to its log, if it still can."""

    def kill(self) -> None:
        """End it at once, whatever it does."""

    async def stop(self, patience_s: float) -> int:
        """Wait for its end, kill it when it does not come; returns the exit code."""


@dataclass
class Placed:
    """Ranks that were started and told what to load."""

    workers: list[Worker]  # by rank
    release: Callable[[], None]  # gives back what they needed to meet; called once, after their end


class Place(Protocol):
    """Where the ranks of a replica run: an executor."""

    async def start(self, load: Load) -> Placed:
        """Start the ranks. Raises: whatever keeps them from being started; nothing runs then."""


async def placed_in_time(place: Place, load: Load) -> Placed:
    """Start the ranks of a replica. Raises: WorkerCrashed where that takes as long as loading may; as `Place.start`."""
    limit, placed = load.config.load_timeout_s, None
    # Not asyncio.wait_for: before Python 3.12 it forgets that it was cancelled when the ranks start at that moment.
    starting = asyncio.create_task(place.start(load))
    try:
        if not (await asyncio.wait([starting], timeout=limit))[0]:
            raise WorkerCrashed(f"The worker processes had not started after {limit:g} s (--load-timeout-s).")
        placed = starting.result()
    finally:
        if placed is None:
            await _undo(starting)
    return placed


async def _undo(starting: asyncio.Task[Placed]) -> None:
    """Nobody wants these ranks any more, whether they are on their way or just there."""
    starting.cancel()
    await asyncio.wait([starting])
    if not starting.cancelled() and starting.exception() is None:
        for worker in starting.result().workers:
            worker.kill()
        starting.result().release()


class WorkerGroup:
    """Ranks that live and die together."""

    def __init__(self, placed: Placed) -> None:
        """Must be made on a running event loop."""
        self._placed = placed
        self._ending = False  # a rank that goes now is no surprise
        self._inbox: asyncio.Queue[tuple[int, bytes | None]] = asyncio.Queue()
        self._pumps = [asyncio.create_task(self._pump(rank, worker)) for rank, worker in enumerate(self.workers)]

    @property
    def workers(self) -> Sequence[Worker]:
        """By rank."""
        return self._placed.workers

    def send(self, message: object) -> None:
        """Queue a message to rank 0."""
        self.workers[0].send(message)

    async def messages(self, patience: Callable[[], float | None]) -> AsyncIterator[FromWorker]:
        """What the group says, until a rank has died or rank 0 was silent for longer than `patience()` seconds.

        All ranks are dead or dying when this ends.
        """
        silent, alive = 0.0, set(range(len(self.workers)))
        arriving = asyncio.ensure_future(self._inbox.get())
        try:
            while alive:  # what the others said before their end may tell why
                done, _ = await asyncio.wait([arriving], timeout=WATCH_SECONDS)
                if not done:
                    if self._ending:
                        return
                    limit = patience()
                    silent = 0.0 if limit is None else silent + WATCH_SECONDS
                    if limit is not None and silent >= limit:
                        log.error("the worker has been silent for %g s in the middle of its work; killing it", silent)
                        await self._dump()
                        self.kill()
                        return
                    continue
                frames = [arriving.result()]
                while not self._inbox.empty():  # a step of many requests tells something of each
                    frames.append(self._inbox.get_nowait())
                for rank, frame in frames:
                    if frame is None:
                        alive.remove(rank)
                        self._lost(rank)
                        continue
                    silent = silent if rank else 0.0
                    message = decode_from_worker(frame)
                    if rank == 0 or isinstance(message, LoadFailed):
                        yield message
                arriving = asyncio.ensure_future(self._inbox.get())
        except msgspec.DecodeError as error:
            log.error("a worker sent something that is no message (%s); killing it", error)
            self.kill()
        finally:
            arriving.cancel()

    async def _dump(self) -> None:
        """Where every rank is: the one that hangs need not be the one that is silent. One after another, so that the
        log can be read."""
        for rank, worker in enumerate(self.workers):
            log.error("stacks of rank %d (process %d):", rank, worker.pid)
            worker.dump()
            await asyncio.sleep(DUMP_SECONDS)

    def kill(self) -> None:
        """End every rank at once."""
        self._ending = True
        for worker in self.workers:
            worker.kill()

    async def stop(self, patience_s: float) -> str:
        """Wait for all ranks to end, kill those that do not; returns how they ended, in words."""
        self._ending = True
        try:
            codes = await asyncio.gather(*(worker.stop(patience_s) for worker in self.workers))
        finally:
            for pump in self._pumps:
                pump.cancel()
            self._placed.release()
        if len(codes) == 1:
            return f"exit code {codes[0]}"
        return "exit codes " + ", ".join(f"{code} (rank {rank})" for rank, code in enumerate(codes))

    def _lost(self, rank: int) -> None:
        """A rank is gone: what it computed with the others is lost, and they would wait for it."""
        if not self._ending and len(self.workers) > 1:
            log.error("rank %d of %d is gone; ending the others", rank, len(self.workers))
        self.kill()

    async def _pump(self, rank: int, worker: Worker) -> None:
        try:
            with contextlib.suppress(ChannelClosed):
                while True:
                    self._inbox.put_nowait((rank, await worker.frame()))
        finally:  # whatever ended it: nothing will be heard of this rank any more
            self._inbox.put_nowait((rank, None))
