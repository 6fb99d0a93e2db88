"""The front's end of the engine: admits requests, hands out tickets, and shares the work out over the replicas.

Every admitted request is kept here until it is answered. When a replica dies, requests that had started fail with
`WorkerCrashed`; those still waiting go to another replica, or wait for the next one to be ready.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import Literal

import msgspec

from multimodal_gen.adapters import Change, LoraState, LoraStates, Side
from multimodal_gen.config import EngineConfig, ServerConfig, engine_part
from multimodal_gen.engine.admitted import Admitted
from multimodal_gen.engine.cards import describe
from multimodal_gen.engine.group import Place
from multimodal_gen.engine.process import LocalProcesses
from multimodal_gen.engine.readings import total, total_text, total_use
from multimodal_gen.engine.replica import STOP_SECONDS, Replica
from multimodal_gen.engine.text_loras import TextLoras
from multimodal_gen.engine.ticket import AnyTicket, TextTicket, Ticket
from multimodal_gen.engine.transaction import change_all, sleep_all, to_its_end, wake_all
from multimodal_gen.environment import worker_threads
from multimodal_gen.errors import (
    Asleep,
    Cancelled,
    GenerationFailed,
    MmgenError,
    ModelLoading,
    QueueFull,
    ShuttingDown,
    UnsupportedEndpoint,
    WorkerCrashed,
)
from multimodal_gen.lora.sources import start_change
from multimodal_gen.messages import (
    Finished,
    Gauges,
    Load,
    LorasChanged,
    MemoryChanged,
    Ready,
    RowState,
    TextFinished,
    TextGauges,
)
from multimodal_gen.offload import WeightsUse
from multimodal_gen.parallel.plan import plan
from multimodal_gen.request import AnyRequest, ModelCard
from multimodal_gen.text import TextCard, TextRequest

MAX_RETRY_AFTER = 60.0

State = Literal["loading", "ready", "restarting", "asleep", "waking", "draining", "failed", "stopped"]

log = logging.getLogger(__name__)


class EngineClient:
    """All workers as seen from an asyncio program; all methods belong to its event loop."""

    def __init__(self, config: ServerConfig) -> None:
        """Checks and describes the model. Raises: ModelNotFound, CorruptModel, RemoteCodeRefused, ConfigError."""
        self.config = config
        self.cards = describe(config)
        self.plan = plan(config, self.cards.pictures, text=self.cards.text)
        start_change(config)  # a file that is not there is told before the model is loaded
        self.ready: Ready | None = None  # of the first replica, once all have been ready
        self.failure: MmgenError | None = None
        self.failed = asyncio.Event()
        self._phase: Literal["stopped", "open", "draining"] = "stopped"
        self._ready_or_failed = asyncio.Event()
        self.admitted = Admitted()
        self.replicas = [Replica(number, *self._placed(number), self) for number in range(self.plan.dp)]
        self._supervisors: list[asyncio.Task[None]] = []
        self._changing = asyncio.Lock()  # of adapters, to sleep or to wake: one after another
        self._rest: Literal["awake", "asleep", "waking"] = "awake"  # asleep: as soon as it is asked for
        self._before: LoraStates | None = None  # the change of adapters that is under way
        self.text_loras = TextLoras(config, lambda change: self.change_loras(change, "text"), self.admitted.users)

    def _placed(self, number: int) -> tuple[Load, Place]:
        """What a replica loads, and where its ranks run."""
        ranks, level = self.plan.degrees.world, self.config.log_level
        if self.config.executor == "ray":
            from multimodal_gen.engine.ray_place import RayActors

            part = engine_part(self.config)
            return self._load(part), RayActors(ranks, self.plan.workers, part, level)
        part = worker_threads(self.config, self.plan.workers)
        return self._load(part), LocalProcesses(ranks, number * ranks, level)

    def _load(self, part: EngineConfig) -> Load:
        return Load(self.cards.pictures, part, self.cards.text)

    @property
    def card(self) -> ModelCard:
        """The model of pictures or videos. Raises: UnsupportedEndpoint where there is none."""
        if self.cards.pictures is None:
            raise UnsupportedEndpoint(
                "This server makes no pictures: it was started with a language model alone (--model-path none)."
            )
        return self.cards.pictures

    @property
    def text_card(self) -> TextCard:
        """The language model. Raises: UnsupportedEndpoint where there is none."""
        if self.cards.text is None:
            raise UnsupportedEndpoint(
                "This server writes no text: it was started without a language model (--llm-path)."
            )
        return self.cards.text

    def check_side(self, side: Side) -> None:
        """Raises: UnsupportedEndpoint where that side has no model."""
        _ = self.card if side == "pictures" else self.text_card

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin loading the model in worker processes; returns at once."""
        self._phase = "open"
        for replica in self.replicas:
            replica.state = "loading"
            task = asyncio.create_task(replica.run(), name=f"supervisor of replica {replica.number}")
            self._supervisors.append(task)

    async def wait_ready(self) -> None:
        """Wait until the model is loaded, in every replica. Raises: the error that loading ended with."""
        await self._ready_or_failed.wait()
        if self.failure:
            raise self.failure

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait until the admitted ones are answered, or for `timeout_s`."""
        if self._phase == "open" and self.failure is None:
            self._phase = "draining"
        try:
            await asyncio.wait_for(self.admitted.none_left.wait(), timeout_s)
        except asyncio.TimeoutError:
            log.warning("%d requests were not finished after %g s", len(self.admitted), timeout_s)

    async def stop(self, patience_s: float = STOP_SECONDS) -> None:
        """End the workers, killing them after `patience_s`; requests that are left fail."""
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        for ticket in self.admitted:
            message = "The server shut down before this request was finished."
            self.answered(ticket, GenerationFailed(message) if ticket.started else ShuttingDown(message))
        for replica in self.replicas:
            replica.close("stopped", ShuttingDown("The server shut down before this was done."))
        await asyncio.gather(*(replica.stop(patience_s) for replica in self.replicas))
        self._phase = "stopped"

    # --- what an operator sees ------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Of the whole engine: `ready` once every replica has been, and then while any is, but for sleep."""
        if self._phase == "stopped":
            return "stopped"
        if self.failure is not None:
            return "failed"
        if self._phase == "draining":
            return "draining"
        if self.ready is None:
            return "loading"
        if self._rest != "awake":
            return self._rest
        return "ready" if any(replica.state == "ready" for replica in self.replicas) else "restarting"

    @property
    def restarts(self) -> int:
        """Groups of workers that died and were started again."""
        return sum(replica.restarts for replica in self.replicas)

    @property
    def gauges(self) -> Gauges | None:
        """The latest of all replicas together: sums, and of steps the longest."""
        found = [replica.readings.gauges for replica in self.replicas]
        return total([gauges for gauges in found if gauges is not None])

    @property
    def text_gauges(self) -> TextGauges:
        """The text side of all replicas together."""
        return total_text([replica.readings.text for replica in self.replicas])

    @property
    def text_context(self) -> int:
        """Tokens that a prompt and its answer may have together. Raises: UnsupportedEndpoint, ModelLoading."""
        self.check_side("text")
        if self.ready is None or self.ready.text is None:
            raise ModelLoading("The model is still loading; try again in a few seconds.", retry_after=5.0)
        return self.ready.text.context

    @property
    def weights(self) -> WeightsUse:
        """Where the weights are, of all replicas together."""
        return total_use([replica.readings.weights for replica in self.replicas])

    @property
    def loras(self) -> LoraState:
        """The adapters that requests get from now on; what one replica misses counts as missing."""
        first = next((replica for replica in self.replicas if replica.state == "ready"), self.replicas[0])
        missing = {d: why for replica in self.replicas for d, why in replica.adapters.pictures.missing.items()}
        state = (self._before or first.adapters).pictures
        return msgspec.structs.replace(state, missing=missing) if missing else state

    @property
    def worker_pid(self) -> int | None:
        """Process id of the first worker."""
        return next(iter(self.replicas[0].pids), None)

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: AnyRequest, resume: Sequence[RowState] = ()) -> Ticket:
        """Admit a request, whose rows go on where `resume` says.

        Raises: ModelLoading, Asleep, ShuttingDown, QueueFull with an estimate of when to come back.
        """
        self.check_open()
        waiting = self.admitted.pictures_cost
        if waiting and waiting + request.cost > self.config.max_queue_cost:
            raise QueueFull(
                f"The queue holds {waiting:,} token-steps; with this request's {request.cost:,} it would pass its "
                f"limit of {self.config.max_queue_cost:,}. Try again later.",
                retry_after=self._retry_after(waiting + request.cost - self.config.max_queue_cost),
            )
        ticket = Ticket(request, self.cancel, time.monotonic(), list(resume))
        self.admitted.add(ticket)
        self._dispatch([ticket])
        return ticket

    def submit_text(self, request: TextRequest) -> TextTicket:
        """Admit a text.

        Raises: UnsupportedEndpoint without a language model; ModelLoading, Asleep, ShuttingDown, QueueFull.
        """
        self.check_side("text")
        self.check_open()
        waiting, most = self.admitted.texts_waiting, self.config.max_queued_requests
        if waiting >= most:
            raise QueueFull(
                f"{waiting} texts wait already, which is the limit of this server (--max-queued-requests). Try again "
                "later.",
                retry_after=min(MAX_RETRY_AFTER, max(1.0, waiting * self.text_gauges.step_seconds)),
            )
        ticket = TextTicket(request, self.cancel, time.monotonic())
        self.admitted.add(ticket)
        self._dispatch([ticket])
        return ticket

    def cancel(self, request_id: str) -> None:
        """Stop a request before its next step; its ticket then raises Cancelled. Unknown ids are ignored."""
        ticket = self.admitted.get(request_id)
        if ticket is None:
            return
        if ticket.replica is not None:
            ticket.replica.cancel(ticket)
        else:  # it waits for the next group of workers
            self.answered(ticket, Cancelled("The request was cancelled."))

    def check_open(self) -> None:
        """Raises: ModelLoading, Asleep, ShuttingDown."""
        self._check_up()
        if self.state == "asleep":
            raise Asleep("The model is asleep: its memory is given back. POST /v1/wake brings it back.")
        if self.state == "waking":
            raise ModelLoading("The model is waking up; try again in a few seconds.", retry_after=5.0)

    def _check_up(self) -> None:
        if self.ready is None and self.state == "loading":
            raise ModelLoading("The model is still loading; try again in a few seconds.", retry_after=5.0)
        if self.state in ("draining", "stopped", "failed"):
            raise ShuttingDown("The server is shutting down and takes no new requests.")

    def _dispatch(self, tickets: Iterable[AnyTicket]) -> None:
        for ticket in tickets:
            ticket.replica = least_loaded(self.replicas)
            if ticket.replica is not None:
                ticket.replica.take(ticket)

    def _retry_after(self, tokens: int) -> float:
        rate = sum(r.readings.tokens_per_second for r in self.replicas if r.state == "ready")
        return min(MAX_RETRY_AFTER, max(1.0, tokens / rate if rate else 5.0))

    # --- adapters -------------------------------------------------------------------------------------------------

    async def change_loras(self, change: Change, side: Side = "pictures") -> LorasChanged:
        """A transaction on the adapters of all replicas; changes are made one after another.

        Raises: UnsupportedEndpoint where that side has no model; ModelLoading, Asleep, ShuttingDown, WorkerCrashed; the
            change's own error. The adapters are then as before.
        """
        self.check_side(side)
        return await to_its_end(self._change_loras(change, side))

    async def _change_loras(self, change: Change, side: Side) -> LorasChanged:
        async with self._changing:
            self.check_open()
            if any(replica.state != "ready" for replica in self.replicas):
                raise ModelLoading("A worker is restarting; try again in a few seconds.", retry_after=5.0)
            self._before = self.replicas[0].adapters
            try:
                return await change_all(self.replicas, change, side, self._before)
            finally:
                self._before = None

    # --- sleep ----------------------------------------------------------------------------------------------------

    def sleep(self) -> Awaitable[MemoryChanged]:
        """Give the memory of all replicas back, once the requests that were admitted are answered.

        New ones are refused as soon as this returns; the awaitable tells what was freed.
        Raises: ModelLoading, ShuttingDown.
        """
        self._check_up()
        self._rest = "asleep"
        return to_its_end(self._sleep())

    async def _sleep(self) -> MemoryChanged:
        async with self._changing:
            self._rest = "asleep"  # it may have been woken a moment ago
            await self.admitted.none_left.wait()
            self._check_up()
            return await sleep_all(self.replicas)

    def wake(self) -> Awaitable[MemoryChanged]:
        """Bring all replicas back; nothing is done where they are.

        Raises: ModelLoading, ShuttingDown; WeightsUnavailable, OutOfMemory, WorkerCrashed, after which they sleep on.
        """
        return to_its_end(self._wake())

    async def _wake(self) -> MemoryChanged:
        async with self._changing:
            self._check_up()
            if self._rest == "awake":
                return MemoryChanged("", 0.0)
            self._rest = "waking"
            try:
                done = await wake_all(self.replicas)
            except BaseException:
                self._rest = "asleep"
                raise
            self._rest = "awake"
            return done

    # --- what replicas tell ---------------------------------------------------------------------------------------

    def answered(self, ticket: AnyTicket, answer: Finished | TextFinished | MmgenError) -> None:
        """A ticket's last word."""
        self.admitted.answered(ticket, answer)
        self.text_loras.answered()

    def replica_ready(self) -> None:
        """A replica takes requests from now on."""
        if self.ready is None and all(replica.state == "ready" for replica in self.replicas):
            self.ready = self.replicas[0].ready
            self.text_loras.begin(self.replicas[0].adapters.text)
            self._ready_or_failed.set()
        self._dispatch([ticket for ticket in self.admitted if ticket.replica is None])

    def replica_died(self, waiting: list[AnyTicket]) -> None:
        """A replica is starting again; these tickets had not been started."""
        for ticket in waiting:
            ticket.replica = None
        self._dispatch(waiting)

    def replicas_loading(self) -> int:
        """How many load at this moment, or are about to."""
        return sum(replica.state != "ready" for replica in self.replicas)

    def replica_failed(self, error: MmgenError) -> None:
        """A replica cannot be kept alive: neither can the server, which must not go on with less than was asked for."""
        if self.failure is not None:
            return
        self.failure = error
        for ticket in self.admitted:
            self.answered(ticket, WorkerCrashed("The worker process cannot be kept alive; the server is stopping."))
        self._ready_or_failed.set()
        self.failed.set()


def least_loaded(replicas: Sequence[Replica]) -> Replica | None:
    """The ready replica with the least to do, pictures and texts together; None where no replica is ready."""
    return min((r for r in replicas if r.state == "ready"), key=lambda replica: replica.cost, default=None)
