"""One replica of the model: a group of ranks, watched, restarted when it dies, and the requests in its hands."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from typing import Literal, Protocol

import msgspec

from multimodal_gen.adapters import Change, LoraStates, Side
from multimodal_gen.engine.group import Place, WorkerGroup, placed_in_time
from multimodal_gen.engine.orders import Orders, rebuilt
from multimodal_gen.engine.patience import Patience
from multimodal_gen.engine.readings import Readings
from multimodal_gen.engine.ticket import AnyTicket, TextTicket, Ticket
from multimodal_gen.errors import (
    Cancelled,
    CorruptModel,
    DeadlineExceeded,
    MmgenError,
    ModelLoading,
    ShuttingDown,
    WeightsUnavailable,
    WorkerCrashed,
)
from multimodal_gen.messages import (
    Cancel,
    ChangeLoras,
    Failed,
    Finished,
    FromWorker,
    Gauges,
    Load,
    LoadFailed,
    LorasChanged,
    LorasRefused,
    MemoryChanged,
    OfARequest,
    Progress,
    Ready,
    Shutdown,
    Sleep,
    Started,
    TextFinished,
    TextGauges,
    TextStep,
    Wake,
)

STORM_RESTARTS = 5
STORM_SECONDS = 600.0
STOP_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 5

State = Literal["loading", "ready", "restarting", "asleep", "waking", "failed", "stopped"]

log = logging.getLogger(__name__)


class Owner(Protocol):
    """Whoever holds the tickets."""

    def answered(self, ticket: AnyTicket, answer: Finished | TextFinished | MmgenError) -> None:
        """A ticket's last word."""

    def replica_ready(self) -> None:
        """A replica takes requests from now on."""

    def replica_died(self, waiting: list[AnyTicket]) -> None:
        """A replica is starting again; these tickets had not been started, and any replica may have them."""

    def replicas_loading(self) -> int:
        """How many load at this moment, or are about to."""

    def replica_failed(self, error: MmgenError) -> None:
        """A replica cannot be kept alive."""


class Replica:
    """Supervision of one group; all methods belong to the event loop of its owner."""

    def __init__(self, number: int, load: Load, place: Place, owner: Owner) -> None:
        """`load`: what its groups are told first, but for what only the moment knows."""
        self.number = number
        self.state: State = "stopped"
        self.ready: Ready | None = None
        self.readings = Readings()
        self.adapters = LoraStates()
        self.restarts = 0
        self.tickets: dict[str, AnyTicket] = {}
        self._load = msgspec.structs.replace(load, replica=number)
        self.place = place
        self._owner = owner
        self._group: WorkerGroup | None = None
        self._patience = Patience(load.config.step_timeout_s)
        self._spoke = 0.0  # monotonic seconds when the silence of now began; 0: there is no work
        self._deaths: deque[float] = deque()
        self._failure: MmgenError | None = None
        self._orders = Orders()
        self._wanted = asyncio.Event()  # not set while the model is to sleep: a group that has ended stays away
        self._wanted.set()
        self._dismissed = False  # set while a group is ended so that its memory is free
        self._away = asyncio.Event()  # set while there is no group, nor will be before it is wanted

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        return [] if self._group is None else [worker.pid for worker in self._group.workers]

    @property
    def cost(self) -> float:
        """Token-steps of pictures in its hands that are still to be done, and tokens of text."""
        return sum(ticket.cost_left for ticket in self.tickets.values())

    # --- requests -------------------------------------------------------------------------------------------------

    def take(self, ticket: AnyTicket) -> None:
        """Send a ticket's request to the group, which must be ready."""
        assert self._group is not None, self.state
        left = ticket.request.deadline_s
        if left is not None:
            left -= time.monotonic() - ticket.arrived
            if left <= 0:
                error = DeadlineExceeded("The request's deadline passed before it was started.")
                self._owner.answered(ticket, error)
                return
        self._group.send(ticket.message(left))
        self.tickets[ticket.request.id] = ticket
        self._spoke = self._spoke or time.monotonic()

    def cancel(self, ticket: AnyTicket) -> None:
        """Stop a request that it has taken, before the next step."""
        assert self._group is not None, self.state
        ticket.cancelled = True
        self._group.send(Cancel(ticket.request.id))

    async def change(self, change: Change, side: Side) -> LorasChanged:
        """A transaction on the adapters, one at a time.

        Raises: ModelLoading, WorkerCrashed; the change's own error. The adapters are then as before.
        """
        if self._group is None or self.state != "ready":
            raise ModelLoading("The worker is restarting; try again in a few seconds.", retry_after=5.0)
        return await self._orders.change(ChangeLoras(uuid.uuid4().hex, change, side), self._group)

    def start_over(self, adapters: LoraStates, why: str) -> None:
        """End the group; the next one begins with these adapters."""
        log.error("replica %d starts over: %s", self.number, why)
        self.adapters = adapters
        self._end_group()

    def _end_group(self) -> None:
        if self._group is not None:
            self._group.kill()

    # --- sleep ----------------------------------------------------------------------------------------------------

    async def sleep(self) -> MemoryChanged:
        """Give all memory of the model back; it has no requests.

        A group that cannot is ended: one that is starting, and one whose weights nobody but diffusers knows of.
        """
        self._wanted.clear()
        if self.state == "ready" and self.ready is not None and self.ready.rests:
            with contextlib.suppress(WorkerCrashed, ShuttingDown):
                done = await self._orders.rest(Sleep(uuid.uuid4().hex), self._group)
                if done.error is None:
                    self.state = "asleep"
                    return done
                log.error("replica %d is ended to give its memory back: %s", self.number, done.error.message)
        if self.state != "asleep":
            await self._ended()
        return MemoryChanged("", 0.0)

    async def wake(self) -> MemoryChanged:
        """Bring the model back; where its group has ended, by starting another one.

        Raises: WeightsUnavailable, OutOfMemory, GenerationFailed, WorkerCrashed; it sleeps then, as before.
        """
        self.state = "waking"
        if self._group is None:
            self._wanted.set()
        try:
            done = await self._orders.rest(Wake(uuid.uuid4().hex), self._group)
        except MmgenError:
            self._wanted.clear()
            await self._ended()
            raise
        if done.error is not None:
            self.state = "asleep"
            raise rebuilt(done.error)
        self._wanted.set()
        self.state = "ready"
        return done

    async def _ended(self) -> None:
        """End the group and wait until it is gone; no other one is wanted."""
        self._dismissed = not self._away.is_set()
        self._end_group()
        await self._away.wait()

    # --- supervision ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a group alive until this is cancelled, or gives up and tells the owner."""
        self.state = "loading"
        try:
            await self._keep_alive()
        except Exception as error:  # whatever it is, waiters must hear of it
            log.exception("supervision of the worker failed")
            self._failure = WorkerCrashed(f"The worker cannot be supervised ({type(error).__name__}: {error}).")
        assert self._failure is not None, "supervision ends with a reason"
        self.close("failed", WorkerCrashed("The worker process cannot be kept alive; the server is stopping."))
        self._owner.replica_failed(self._failure)

    def close(self, state: Literal["failed", "stopped"], error: MmgenError) -> None:
        """Nothing is brought back any more; what is under way beside requests ends with `error`."""
        self.state = state
        self._away.set()
        self._orders.fail(error)

    async def stop(self, patience_s: float) -> None:
        """End the group, killing it after `patience_s`; `run` has been cancelled."""
        if self._group is not None:
            self._group.send(Shutdown())
            await self._group.stop(patience_s)
        self.state = "stopped"

    async def _keep_alive(self) -> None:
        while True:
            await self._until_wanted()
            ended = await self._one_life()
            if self._orders.waking:  # it did not wake; the owner decides when to try again
                self._wanted.clear()
            if self._failure is None and self._wanted.is_set() and self._is_storm():
                self._failure = WorkerCrashed(
                    f"The worker died {STORM_RESTARTS} times within {STORM_SECONDS:g} s (last {ended})."
                )
            if self._failure is not None:
                return
            if not self._dismissed:
                after = "restarting it" if self._wanted.is_set() else "another one starts when the model is woken"
                log.error("the worker ended with %s; %s", ended, after)
                self.restarts += 1
            self._orders.fail(WorkerCrashed("The worker process died before this was done; all is as it was before."))
            self._let_go()
            # A machine that is short of memory needs a moment; the first death is most often an accident.
            await asyncio.sleep(min(MAX_BACKOFF_SECONDS, len(self._deaths) - 1))
            # An injected fault belongs to the first group only.
            unharmed = msgspec.structs.replace(self._load.config, fault=None)
            self._load = msgspec.structs.replace(self._load, config=unharmed)

    async def _until_wanted(self) -> None:
        """While the model is to sleep, no group is started: the memory stays free, whatever ended the last one."""
        if not self._wanted.is_set():
            self._group, self.state, self._dismissed = None, "asleep", False
            self._away.set()
            await self._wanted.wait()
        self._away.clear()

    async def _one_life(self) -> str:
        """From the start of a group to its end, which is told in words."""
        adapters = self.adapters if self.ready else None
        load = msgspec.structs.replace(self._load, loras=adapters, loading=self._owner.replicas_loading())
        self._group, self._patience, self._spoke = None, Patience(load.config.step_timeout_s), 0.0
        try:
            self._group = WorkerGroup(await placed_in_time(self.place, load))
        except Exception as error:
            log.error("no worker could be started", exc_info=None if isinstance(error, MmgenError) else error)
            if self.ready is None:
                told = WorkerCrashed(f"The workers cannot be started ({type(error).__name__}: {error}).")
                self._failure = error if isinstance(error, MmgenError) else told
            return f"a failed start ({type(error).__name__})"
        if not self._wanted.is_set():  # meanwhile
            self._end_group()
        async for message in self._group.messages(self._stall_limit):
            self._handle(message)
        self.state = "restarting" if self.ready else "loading"  # requests go elsewhere from now on
        self.readings.forget()
        return await self._group.stop(STOP_SECONDS)

    def _stall_limit(self) -> float | None:
        """Seconds of silence after which the group counts as hung; None while silence is natural."""
        if self.state == "asleep":
            return None
        if self.state != "ready":
            return self._load.config.load_timeout_s
        if self._orders.pending:
            return self._load.config.step_timeout_s
        if not self.tickets:
            self._spoke = 0.0
            return None
        return self._patience.limit(ticket.request for ticket in self.tickets.values())

    def _note_silence(self, message: FromWorker) -> None:
        now = time.monotonic()
        if self._spoke:
            self._patience.spoke(
                now - self._spoke,
                message.step_tokens if isinstance(message, Gauges) else 0,
                message.step_tokens if isinstance(message, TextGauges) else 0,
            )
        self._spoke = now if self.tickets else 0.0

    def _handle(self, message: FromWorker) -> None:
        self._note_silence(message)
        if isinstance(message, Ready):
            self.ready, self.adapters = message, self._restored(message)
            self._patience.batch_tokens = message.max_batch_tokens
            self._patience.chunk_tokens = message.text.chunk_tokens if message.text is not None else 0
            self.state = "ready"
            self.readings.note(message)
            self._orders.ready(message)
            self._owner.replica_ready()
        elif isinstance(message, LoadFailed):
            error = rebuilt(message.error)
            if self.ready is None:
                self._failure = self._failure or error  # it has never worked: trying again would not help
            else:
                log.error("the model could not be loaded again: %s", error.message)
                self._orders.fail(WeightsUnavailable(error.message) if isinstance(error, CorruptModel) else error)
        elif isinstance(message, (Gauges, TextGauges)):
            self.readings.note(message)
        elif isinstance(message, MemoryChanged):
            self.readings.note(message)
            self._orders.answered(message)
        elif isinstance(message, (LorasChanged, LorasRefused)):
            if isinstance(message, LorasChanged):
                self.adapters = self.adapters.changed(message.side, message.state)
            self._orders.answered(message)
        elif isinstance(message, TextStep):
            self._deliver_deltas(message)
        elif message.request_id in self.tickets:
            self._deliver(self.tickets[message.request_id], message)

    def _restored(self, message: Ready) -> LoraStates:
        """The adapters of a new group; where they could not come back, requests are told instead of served less."""
        if message.lora_error is None:
            for why in (*message.loras.pictures.missing.values(), *message.loras.text.missing.values()):
                log.error("an adapter is missing after the restart: %s", why)
            return message.loras
        log.error("the adapters could not be brought back: %s", message.lora_error.message)
        active = self.adapters.pictures.active
        missing = {pin.digest: message.lora_error.message for pin in active}
        lost = msgspec.structs.replace(message.loras.pictures, active=active, missing=missing)
        return message.loras.changed("pictures", lost)

    def _deliver(self, ticket: AnyTicket, message: OfARequest | TextFinished) -> None:
        if isinstance(message, Failed):
            self._answer(ticket, rebuilt(message.error))
        elif isinstance(message, (Finished, TextFinished)):
            self._patience.finished(ticket.request)
            self._answer(ticket, message)
        elif isinstance(message, Started):
            ticket.started = True
            ticket.push(message)
        else:
            assert isinstance(ticket, Ticket), f"{type(message).__name__} is of pictures"
            ticket.steps_done += isinstance(message, Progress)
            ticket.push(message)

    def _deliver_deltas(self, message: TextStep) -> None:
        for delta in message.deltas:
            ticket = self.tickets.get(delta.request_id)
            if isinstance(ticket, TextTicket):  # it may just have been cancelled
                ticket.tokens_done += len(delta.token_ids)
                ticket.push(delta)

    def _answer(self, ticket: AnyTicket, answer: Finished | TextFinished | MmgenError) -> None:
        del self.tickets[ticket.request.id]
        self._owner.answered(ticket, answer)

    def _let_go(self) -> None:
        """The group is dead: what had started fails, what was cancelled is gone, what waited may go anywhere."""
        held, self.tickets = list(self.tickets.values()), {}
        for ticket in held:
            if ticket.started:
                self._owner.answered(ticket, WorkerCrashed("The worker process died while it ran this request."))
            elif ticket.cancelled:
                self._owner.answered(ticket, Cancelled("The request was cancelled."))
        self._owner.replica_died([ticket for ticket in held if not ticket.started and not ticket.cancelled])

    def _is_storm(self) -> bool:
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > STORM_SECONDS:
            self._deaths.popleft()
        return len(self._deaths) == STORM_RESTARTS
