"""The front's end of the engine: starts the worker process, watches it, restarts it, and hands out tickets.

Every admitted request is kept here until it is answered. When the worker dies, requests that had started fail with
`WorkerCrashed`; those still waiting are sent to the next worker.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec

from multimodal_gen.adapters import Change, LoraState
from multimodal_gen.config import ServerConfig, engine_part
from multimodal_gen.engine.process import WorkerProcess
from multimodal_gen.engine.ticket import Ticket
from multimodal_gen.errors import (
    Cancelled,
    DeadlineExceeded,
    GenerationFailed,
    MmgenError,
    ModelLoading,
    QueueFull,
    ShuttingDown,
    WorkerCrashed,
    from_code,
)
from multimodal_gen.lora.sources import start_change
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
    RowState,
    Shutdown,
    Started,
)
from multimodal_gen.parallel.plan import plan
from multimodal_gen.pipelines import registry
from multimodal_gen.request import AnyRequest

STORM_RESTARTS = 5
STORM_SECONDS = 600.0
STOP_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 5
MAX_RETRY_AFTER = 60.0

State = Literal["loading", "ready", "restarting", "draining", "failed", "stopped"]

log = logging.getLogger(__name__)


class EngineClient:
    """One worker process as seen from an asyncio program; all methods belong to its event loop."""

    def __init__(self, config: ServerConfig) -> None:
        """Checks and describes the model. Raises: ModelNotFound, CorruptModel, RemoteCodeRefused, ConfigError."""
        self.config = config
        self.card = registry.describe(config)
        self.plan = plan(config, self.card)
        start_change(config)  # a file that is not there is told before the model is loaded
        self.state: State = "stopped"
        self.ready: Ready | None = None
        self.gauges: Gauges | None = None
        self.loras = LoraState()
        self.restarts = 0
        self.failure: MmgenError | None = None
        self.failed = asyncio.Event()
        self._ready_or_failed = asyncio.Event()
        self._tickets: dict[str, Ticket] = {}
        self._nothing_left = asyncio.Event()
        self._nothing_left.set()
        self._worker: WorkerProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._deaths: deque[float] = deque()
        self._tokens_per_second = 0.0
        self._changing = asyncio.Lock()
        self._change: tuple[str, asyncio.Future[LorasChanged]] | None = None

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin loading the model in a worker process; returns at once."""
        self.state = "loading"
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self) -> None:
        """Wait until the model is loaded. Raises: the error that loading ended with."""
        await self._ready_or_failed.wait()
        if self.failure:
            raise self.failure

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait until the admitted ones are answered, or for `timeout_s`."""
        if self.state not in ("failed", "stopped"):
            self.state = "draining"
        try:
            await asyncio.wait_for(self._nothing_left.wait(), timeout_s)
        except asyncio.TimeoutError:
            log.warning("%d requests were not finished after %g s", len(self._tickets), timeout_s)

    async def stop(self, patience_s: float = STOP_SECONDS) -> None:
        """End the worker, killing it after `patience_s`; requests that are left fail."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        for ticket in list(self._tickets.values()):
            message = "The server shut down before this request was finished."
            self._resolve(ticket, GenerationFailed(message) if ticket.started else ShuttingDown(message))
        self._fail_change(ShuttingDown("The server shut down before this change was done."))
        if self._worker is not None:
            self._worker.send(Shutdown())
            await self._worker.stop(patience_s)
        self.state = "stopped"

    @property
    def worker_pid(self) -> int | None:
        """Process id of the current worker."""
        return self._worker.pid if self._worker else None

    # --- requests -------------------------------------------------------------------------------------------------

    @property
    def outstanding_cost(self) -> int:
        """Token-steps admitted and not yet answered."""
        return sum(ticket.request.cost for ticket in self._tickets.values())

    @property
    def waiting(self) -> int:
        """Requests admitted and not yet started."""
        return sum(not ticket.started for ticket in self._tickets.values())

    @property
    def running(self) -> int:
        """Requests started and not yet answered."""
        return len(self._tickets) - self.waiting

    def submit(self, request: AnyRequest, resume: Sequence[RowState] = ()) -> Ticket:
        """Admit a request, whose rows go on where `resume` says.

        Raises: ModelLoading, ShuttingDown, QueueFull with an estimate of when to come back.
        """
        self._check_open()
        waiting = self.outstanding_cost
        if waiting and waiting + request.cost > self.config.max_queue_cost:
            raise QueueFull(
                f"The queue holds {waiting:,} token-steps; with this request's {request.cost:,} it would pass its "
                f"limit of {self.config.max_queue_cost:,}. Try again later.",
                retry_after=self._retry_after(waiting + request.cost - self.config.max_queue_cost),
            )
        ticket = Ticket(request, self.cancel, time.monotonic(), list(resume))
        self._tickets[request.id] = ticket
        self._nothing_left.clear()
        self._send(ticket)
        return ticket

    def _check_open(self) -> None:
        if self.ready is None and self.state in ("loading", "restarting"):
            raise ModelLoading("The model is still loading; try again in a few seconds.", retry_after=5.0)
        if self.state in ("draining", "stopped", "failed"):
            raise ShuttingDown("The server is shutting down and takes no new requests.")

    def cancel(self, request_id: str) -> None:
        """Stop a request before its next step; its ticket then raises Cancelled. Unknown ids are ignored."""
        ticket = self._tickets.get(request_id)
        if ticket is None:
            return
        if ticket.sent and self._worker is not None:
            ticket.cancelled = True
            self._worker.send(Cancel(request_id))
        else:  # it waits for the next worker
            self._resolve(ticket, Cancelled("The request was cancelled."))

    async def change_loras(self, change: Change) -> LorasChanged:
        """A transaction on the adapters; changes are made one after another.

        Raises: ModelLoading, ShuttingDown, WorkerCrashed; the change's own error. The adapters are then as before.
        """
        async with self._changing:
            self._check_open()
            assert self._worker is not None, self.state
            if self.state == "restarting":
                raise ModelLoading("The worker is restarting; try again in a few seconds.", retry_after=5.0)
            answer: asyncio.Future[LorasChanged] = asyncio.get_running_loop().create_future()
            self._change = (uuid.uuid4().hex, answer)
            try:
                self._worker.send(ChangeLoras(self._change[0], change))
                return await answer
            finally:
                self._change = None

    def _send(self, ticket: Ticket) -> None:
        if self.state not in ("ready", "draining") or self._worker is None:
            return  # sent when the next worker is ready
        request = ticket.request
        if request.deadline_s is not None:
            left = request.deadline_s - (time.monotonic() - ticket.arrived)
            if left <= 0:
                self._resolve(ticket, DeadlineExceeded("The request's deadline passed before it was started."))
                return
            request = msgspec.structs.replace(request, deadline_s=left)
        self._worker.send(Generate(request, ticket.resume))
        ticket.sent = True

    def _resolve(self, ticket: Ticket, answer: Finished | MmgenError) -> None:
        del self._tickets[ticket.request.id]
        ticket.push(answer)
        if not self._tickets:
            self._nothing_left.set()

    def _retry_after(self, tokens: int) -> float:
        rate = self._tokens_per_second
        return min(MAX_RETRY_AFTER, max(1.0, tokens / rate if rate else 5.0))

    # --- supervision ----------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        try:
            await self._keep_alive()
        except Exception as error:  # a worker that cannot even be spawned; waiters must hear of it
            log.exception("supervision of the worker failed")
            self.failure = WorkerCrashed(f"The worker cannot be supervised ({type(error).__name__}: {error}).")
            self._give_up()

    async def _keep_alive(self) -> None:
        config = engine_part(self.config)
        while True:
            self._worker = await WorkerProcess.start(self.config.log_level)
            self._worker.send(Load(self.card, config, self.loras if self.ready else None))
            async for message in self._worker.messages(self._stall_limit):
                self._handle(message)
            code = await self._worker.stop(STOP_SECONDS)
            if self.failure is None and self._is_storm():
                self.failure = WorkerCrashed(
                    f"The worker died {STORM_RESTARTS} times within {STORM_SECONDS:g} s (last exit code {code})."
                )
            if self.failure is not None:
                self._give_up()
                return
            log.error("the worker ended with exit code %s; restarting it", code)
            self._fail_started()
            self._fail_change(WorkerCrashed("The worker process died during this change; the adapters are as before."))
            self.restarts += 1
            if self.state != "draining":
                self.state = "restarting" if self.ready else "loading"
            # A machine that is short of memory needs a moment; the first death is most often an accident.
            await asyncio.sleep(min(MAX_BACKOFF_SECONDS, len(self._deaths) - 1))
            # An injected fault belongs to the first worker only.
            config = msgspec.structs.replace(config, fault=None)

    def _stall_limit(self) -> float | None:
        """Seconds of silence after which the worker counts as hung; None while silence is natural."""
        busy = self._change is not None or any(ticket.sent for ticket in self._tickets.values())
        return self.config.step_timeout_s if busy else None

    def _handle(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self.ready, self.loras = message, self._restored(message)
            self.state = "draining" if self.state == "draining" else "ready"
            self._ready_or_failed.set()
            for ticket in list(self._tickets.values()):
                self._send(ticket)
        elif isinstance(message, LoadFailed):
            error = from_code(message.error.code, message.error.message, message.error.param)
            if self.ready is None:
                self.failure = error  # it has never worked: trying again would not help
            else:
                log.error("the model could not be loaded again: %s", error.message)
        elif isinstance(message, Gauges):
            self.gauges = message
            rate = message.step_tokens / max(message.step_seconds, 1e-6)
            self._tokens_per_second = (
                rate if not self._tokens_per_second else 0.9 * self._tokens_per_second + 0.1 * rate
            )
        elif isinstance(message, (LorasChanged, LorasRefused)):
            self._loras_answered(message)
        elif message.request_id in self._tickets:
            self._deliver(self._tickets[message.request_id], message)

    def _restored(self, message: Ready) -> LoraState:
        """The adapters of a new worker; where they could not come back, requests are told instead of served less."""
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
            return  # a change of policy by itself, or whoever asked is gone
        if isinstance(message, LorasChanged):
            self._change[1].set_result(message)
        else:
            self._fail_change(from_code(message.error.code, message.error.message, message.error.param))

    def _fail_change(self, error: MmgenError) -> None:
        if self._change is not None and not self._change[1].done():
            self._change[1].set_exception(error)

    def _deliver(self, ticket: Ticket, message: Started | Progress | Checkpoint | Preview | Finished | Failed) -> None:
        if isinstance(message, Finished):
            self._resolve(ticket, message)
        elif isinstance(message, Failed):
            self._resolve(ticket, from_code(message.error.code, message.error.message, message.error.param))
        else:
            ticket.started |= isinstance(message, Started)
            ticket.push(message)

    def _fail_started(self) -> None:
        for ticket in [ticket for ticket in self._tickets.values() if ticket.started]:
            self._resolve(ticket, WorkerCrashed("The worker process died while it ran this request."))
        for ticket in [ticket for ticket in self._tickets.values() if ticket.cancelled]:
            self._resolve(ticket, Cancelled("The request was cancelled."))
        for ticket in self._tickets.values():
            ticket.sent = False

    def _is_storm(self) -> bool:
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > STORM_SECONDS:
            self._deaths.popleft()
        return len(self._deaths) == STORM_RESTARTS

    def _give_up(self) -> None:
        assert self.failure is not None
        self.state = "failed"
        for ticket in list(self._tickets.values()):
            self._resolve(ticket, WorkerCrashed("The worker process cannot be kept alive; the server is stopping."))
        self._fail_change(WorkerCrashed("The worker process cannot be kept alive; the server is stopping."))
        self._ready_or_failed.set()
        self.failed.set()
