"""One replica of the model: a group of ranks, watched, restarted when it dies, and the requests in its hands."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from typing import Literal, Protocol

import msgspec

from multimodal_gen.adapters import Change, LoraState
from multimodal_gen.config import EngineConfig, engine_part
from multimodal_gen.engine.group import Place, WorkerGroup
from multimodal_gen.engine.patience import Patience
from multimodal_gen.engine.ticket import Ticket
from multimodal_gen.errors import (
    Cancelled,
    DeadlineExceeded,
    MmgenError,
    ModelLoading,
    WorkerCrashed,
    from_code,
)
from multimodal_gen.messages import (
    Cancel,
    ChangeLoras,
    Checkpoint,
    Failed,
    Finished,
    FromWorker,
    Gauges,
    Generate,
    Load,
    LoadFailed,
    LorasChanged,
    LorasRefused,
    Preview,
    Progress,
    Ready,
    Shutdown,
    Started,
)
from multimodal_gen.request import ModelCard

STORM_RESTARTS = 5
STORM_SECONDS = 600.0
STOP_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 5

State = Literal["loading", "ready", "restarting", "failed", "stopped"]

log = logging.getLogger(__name__)


class Owner(Protocol):
    """Whoever holds the tickets."""

    def answered(self, ticket: Ticket, answer: Finished | MmgenError) -> None:
        """A ticket's last word."""

    def replica_ready(self) -> None:
        """A replica takes requests from now on."""

    def replica_died(self, waiting: list[Ticket]) -> None:
        """A replica is starting again; these tickets had not been started, and any replica may have them."""

    def replica_failed(self, error: MmgenError) -> None:
        """A replica cannot be kept alive."""


class Replica:
    """Supervision of one group; all methods belong to the event loop of its owner."""

    def __init__(self, number: int, card: ModelCard, config: EngineConfig, place: Place, owner: Owner) -> None:
        self.number = number
        self.state: State = "stopped"
        self.ready: Ready | None = None
        self.gauges: Gauges | None = None
        self.loras = LoraState()
        self.restarts = 0
        self.tokens_per_second = 0.0
        self.tickets: dict[str, Ticket] = {}
        self._card = card
        self._config = engine_part(config)
        self.place = place
        self._owner = owner
        self._group: WorkerGroup | None = None
        self._patience = Patience(config.step_timeout_s)
        self._spoke = 0.0  # monotonic seconds when the silence of now began; 0: there is no work
        self._deaths: deque[float] = deque()
        self._failure: MmgenError | None = None
        self._change: tuple[str, asyncio.Future[LorasChanged]] | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        return [] if self._group is None else [worker.pid for worker in self._group.workers]

    @property
    def cost(self) -> float:
        """Token-steps in its hands that are still to be done."""
        return sum(ticket.cost_left for ticket in self.tickets.values())

    # --- requests -------------------------------------------------------------------------------------------------

    def take(self, ticket: Ticket) -> None:
        """Send a ticket's request to the group, which must be ready."""
        assert self._group is not None, self.state
        request = ticket.request
        if request.deadline_s is not None:
            left = request.deadline_s - (time.monotonic() - ticket.arrived)
            if left <= 0:
                error = DeadlineExceeded("The request's deadline passed before it was started.")
                self._owner.answered(ticket, error)
                return
            request = msgspec.structs.replace(request, deadline_s=left)
        self._group.send(Generate(request, ticket.resume))
        self.tickets[request.id] = ticket
        self._spoke = self._spoke or time.monotonic()

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request that it has taken, before the next step."""
        assert self._group is not None, self.state
        ticket.cancelled = True
        self._group.send(Cancel(ticket.request.id))

    async def change(self, change: Change) -> LorasChanged:
        """A transaction on the adapters, one at a time.

        Raises: ModelLoading, WorkerCrashed; the change's own error. The adapters are then as before.
        """
        if self._group is None or self.state != "ready":
            raise ModelLoading("The worker is restarting; try again in a few seconds.", retry_after=5.0)
        assert self._change is None, "the owner makes one change at a time"
        answer: asyncio.Future[LorasChanged] = asyncio.get_running_loop().create_future()
        self._change = (uuid.uuid4().hex, answer)
        try:
            self._group.send(ChangeLoras(self._change[0], change))
            return await answer
        finally:
            self._change = None

    def start_over(self, loras: LoraState, why: str) -> None:
        """End the group; the next one begins with these adapters."""
        log.error("replica %d starts over: %s", self.number, why)
        self.loras = loras
        if self._group is not None:
            self._group.kill()

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
        self.state = "failed"
        self.fail_change(WorkerCrashed("The worker process cannot be kept alive; the server is stopping."))
        self._owner.replica_failed(self._failure)

    async def stop(self, patience_s: float) -> None:
        """End the group, killing it after `patience_s`; `run` has been cancelled."""
        if self._group is not None:
            self._group.send(Shutdown())
            await self._group.stop(patience_s)
        self.state = "stopped"

    async def _keep_alive(self) -> None:
        while True:
            ended = await self._one_life()
            if self._failure is None and self._is_storm():
                self._failure = WorkerCrashed(
                    f"The worker died {STORM_RESTARTS} times within {STORM_SECONDS:g} s (last {ended})."
                )
            if self._failure is not None:
                return
            log.error("the worker ended with %s; restarting it", ended)
            self.restarts += 1
            self.fail_change(WorkerCrashed("The worker process died during this change; the adapters are as before."))
            self._let_go()
            # A machine that is short of memory needs a moment; the first death is most often an accident.
            await asyncio.sleep(min(MAX_BACKOFF_SECONDS, len(self._deaths) - 1))
            # An injected fault belongs to the first group only.
            self._config = msgspec.structs.replace(self._config, fault=None)

    async def _one_life(self) -> str:
        """From the start of a group to its end, which is told in words."""
        load = Load(self._card, self._config, self.loras if self.ready else None)
        self._group, self._patience, self._spoke = None, Patience(self._config.step_timeout_s), 0.0
        try:
            self._group = WorkerGroup(await self.place.start(load))
        except Exception as error:
            log.error("no worker could be started", exc_info=None if isinstance(error, MmgenError) else error)
            if self.ready is None:
                told = WorkerCrashed(f"The workers cannot be started ({type(error).__name__}: {error}).")
                self._failure = error if isinstance(error, MmgenError) else told
            return f"a failed start ({type(error).__name__})"
        async for message in self._group.messages(self._stall_limit):
            self._handle(message)
        self.state = "restarting" if self.ready else "loading"  # requests go elsewhere from now on
        return await self._group.stop(STOP_SECONDS)

    def _stall_limit(self) -> float | None:
        """Seconds of silence after which the group counts as hung; None while silence is natural."""
        if self.state != "ready":
            return self._config.load_timeout_s
        if self._change is not None:
            return self._config.step_timeout_s
        if not self.tickets:
            self._spoke = 0.0
            return None
        return self._patience.limit(ticket.request for ticket in self.tickets.values())

    def _note_silence(self, message: FromWorker) -> None:
        now = time.monotonic()
        if self._spoke:
            self._patience.spoke(now - self._spoke, message.step_tokens if isinstance(message, Gauges) else 0)
        self._spoke = now if self.tickets else 0.0

    def _handle(self, message: FromWorker) -> None:
        self._note_silence(message)
        if isinstance(message, Ready):
            self.ready, self.loras = message, self._restored(message)
            self._patience.batch_tokens = message.max_batch_tokens
            self.state = "ready"
            self._owner.replica_ready()
        elif isinstance(message, LoadFailed):
            error = from_code(message.error.code, message.error.message, message.error.param)
            if self.ready is None:
                self._failure = self._failure or error  # it has never worked: trying again would not help
            else:
                log.error("the model could not be loaded again: %s", error.message)
        elif isinstance(message, Gauges):
            self.gauges = message
            rate, before = message.step_tokens / max(message.step_seconds, 1e-6), self.tokens_per_second
            self.tokens_per_second = rate if not before else 0.9 * before + 0.1 * rate
        elif isinstance(message, (LorasChanged, LorasRefused)):
            self._loras_answered(message)
        elif message.request_id in self.tickets:
            self._deliver(self.tickets[message.request_id], message)

    def _restored(self, message: Ready) -> LoraState:
        """The adapters of a new group; where they could not come back, requests are told instead of served less."""
        if message.lora_error is None:
            for why in message.loras.missing.values():
                log.error("an active adapter is missing after the restart: %s", why)
            return message.loras
        log.error("the adapters could not be brought back: %s", message.lora_error.message)
        missing = {pin.digest: message.lora_error.message for pin in self.loras.active}
        return msgspec.structs.replace(message.loras, active=self.loras.active, missing=missing)

    def _loras_answered(self, message: LorasChanged | LorasRefused) -> None:
        if isinstance(message, LorasChanged):
            self.loras = message.state
        if self._change is None or self._change[0] != message.id or self._change[1].done():
            return  # a change of policy by itself
        if isinstance(message, LorasChanged):
            self._change[1].set_result(message)
        else:
            self.fail_change(from_code(message.error.code, message.error.message, message.error.param))

    def fail_change(self, error: MmgenError) -> None:
        """End a change that is under way."""
        if self._change is not None and not self._change[1].done():
            self._change[1].set_exception(error)

    def _deliver(self, ticket: Ticket, message: Started | Progress | Checkpoint | Preview | Finished | Failed) -> None:
        if isinstance(message, Finished):
            self._patience.finished(ticket.request)
            self._answer(ticket, message)
        elif isinstance(message, Failed):
            self._answer(ticket, from_code(message.error.code, message.error.message, message.error.param))
        else:
            ticket.started |= isinstance(message, Started)
            ticket.steps_done += isinstance(message, Progress)
            ticket.push(message)

    def _answer(self, ticket: Ticket, answer: Finished | MmgenError) -> None:
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
