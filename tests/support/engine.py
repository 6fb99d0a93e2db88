"""An `EngineClient` with real workers, driven from a synchronous test."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import numpy as np
import psutil

from multimodal_gen.adapters import Change
from multimodal_gen.config import ServerConfig
from multimodal_gen.engine import replica as supervision
from multimodal_gen.engine.client import EngineClient
from multimodal_gen.engine.group import Place, Placed
from multimodal_gen.engine.ticket import AnyTicket, Ticket
from multimodal_gen.media.arrays import to_numpy
from multimodal_gen.messages import Checkpoint, Finished, Load, LorasChanged, Progress, RowState
from multimodal_gen.request import AnyRequest, SamplingParams
from multimodal_gen.resolve import resolve
from tests.support.checkpoints import PROMPT
from tests.support.server import wait_for

Result = TypeVar("Result")
LIMIT_S = 120.0


class Faulty:
    """A place that gives every group of ranks the next fault of a list, and none after the last."""

    def __init__(self, place: Place, faults: list[str]) -> None:
        self.place = place
        self.faults = faults
        self.pids: list[int] = []  # of all ranks that it ever started

    async def start(self, load: Load) -> Placed:
        fault = self.faults.pop(0) if self.faults else None
        config = msgspec.structs.replace(load.config, fault=fault)
        placed = await self.place.start(msgspec.structs.replace(load, config=config))
        self.pids += [worker.pid for worker in placed.workers]
        return placed


class Running:
    """A started engine."""

    def __init__(self, client: EngineClient, loop: asyncio.AbstractEventLoop, places: list[Faulty]) -> None:
        self.client = client
        self._loop = loop
        self._places = places
        self._names = iter(range(10**9))

    def do(self, work: Coroutine[Any, Any, Result], timeout_s: float = LIMIT_S) -> Result:
        """Run a coroutine on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_s), self._loop).result()

    def wait_ready(self) -> None:
        """Until every replica takes requests."""
        wait_for(
            lambda: self.client.failure is not None or all(r.state == "ready" for r in self.client.replicas),
            LIMIT_S,
            "being ready",
        )
        assert self.client.failure is None, self.client.failure

    def request(
        self, steps: int = 2, prompt: str = PROMPT, output: Any = "pixels", checkpoint_every: int = 0, **params: Any
    ) -> AnyRequest:
        """A small picture."""
        settings = {"width": 64, "height": 64, "seed": 1, "num_inference_steps": steps, **params}
        return resolve(
            request_id=f"r{next(self._names)}",
            prompt=prompt,
            params=SamplingParams(**settings),
            card=self.client.card,
            max_cost=10**9,
            output=output,
            checkpoint_every=checkpoint_every,
            loras=self.client.loras.active,
        )

    def submit(self, resume: Sequence[RowState] = (), **params: Any) -> Ticket:
        """Admit a request."""

        async def admit() -> Ticket:
            return self.client.submit(self.request(**params), resume)

        return self.do(admit())

    def result(self, ticket: Ticket, timeout_s: float = LIMIT_S) -> np.ndarray:
        """The first output. Raises: the request's error."""
        finished: Finished = self.do(ticket.result(), timeout_s)
        return to_numpy(finished.outputs[0])

    def make(self, **params: Any) -> np.ndarray:
        """Submit and wait."""
        return self.result(self.submit(**params))

    def first_step(self, ticket: Ticket) -> None:
        """Until a request has made a step."""

        async def wait() -> None:
            async for event in ticket:
                if isinstance(event, Progress):
                    return

        self.do(wait())

    def checkpoint(self, ticket: Ticket) -> RowState:
        """The first one that comes."""

        async def wait() -> RowState:
            async for event in ticket:
                if isinstance(event, Checkpoint):
                    return event.state
            raise AssertionError("it ended without a checkpoint")

        return self.do(wait())

    def cancel(self, ticket: AnyTicket) -> None:
        """Give it up."""
        self._loop.call_soon_threadsafe(ticket.cancel)

    def change(self, change: Change) -> LorasChanged:
        """Change the adapters. Raises: the change's error."""
        return self.do(self.client.change_loras(change))

    def alive(self) -> list[int]:
        """Process ids of all its ranks that run, of groups before the present one, too."""
        found = []
        for pid in (pid for place in self._places for pid in place.pids):
            try:
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def pids(self, replica: int = 0) -> list[int]:
        """Of the ranks."""
        return self.client.replicas[replica].pids

    def signal(self, number: signal.Signals, rank: int = 0, replica: int = 0) -> list[int]:
        """Signal one rank; returns the pids of its whole group."""
        pids = self.pids(replica)
        os.kill(pids[rank], number)
        return pids

    def start_again(self, *faults: str) -> None:
        """End replica 0 and wait for its next group, which gets the first of these faults."""
        place = self.client.replicas[0].place
        assert isinstance(place, Faulty)
        place.faults[:] = faults
        before = self.client.restarts
        self.signal(signal.SIGKILL)
        wait_for(lambda: self.client.restarts > before, LIMIT_S, "a restart")
        self.wait_ready()


@contextmanager
def running(*faults: str, **settings: Any) -> Iterator[Running]:
    """An engine whose replica 0 gets these faults, one per group of ranks; no rank is left when the block ends."""
    config = {"dtype": "float32", "threads": 1, "log_level": "error", **settings}
    client = EngineClient(ServerConfig(**config))
    places = [Faulty(replica.place, list(faults) if replica.number == 0 else []) for replica in client.replicas]
    for replica, place in zip(client.replicas, places, strict=True):
        replica.place = place
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    engine = Running(client, loop, places)
    try:
        engine.do(client.start())
        yield engine
    finally:
        engine.do(client.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        wait_for(lambda: engine.alive() == [], 5, "the end of the ranks")


def forgive_deaths(monkeypatch: Any) -> None:
    """Let a group die as often as a test wants, and start the next one at once."""
    monkeypatch.setattr(supervision, "STORM_RESTARTS", 1000)
    monkeypatch.setattr(supervision, "MAX_BACKOFF_SECONDS", 0)
