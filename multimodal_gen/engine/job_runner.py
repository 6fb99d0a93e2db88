"""Runs jobs: feeds them to the engine, writes their checkpoints, makes their files, and loses none of them.

A job that is accepted is in the database. What this process knows besides (who waits, how far a job is) can be lost at
any moment: `start` finds it again. Jobs that were running go on from their checkpoints, bit for bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from multimodal_gen.config import ServerConfig, data_folder
from multimodal_gen.engine.client import EngineClient
from multimodal_gen.engine.job_files import JobFiles
from multimodal_gen.engine.jobs import Job, Jobs, OneThread
from multimodal_gen.engine.ticket import Ticket
from multimodal_gen.errors import (
    CapacityError,
    GenerationFailed,
    MmgenError,
    ShuttingDown,
    StorageFull,
    WorkerCrashed,
)
from multimodal_gen.media.files import slug
from multimodal_gen.media.maker import Maker
from multimodal_gen.media.process import write_video
from multimodal_gen.messages import Checkpoint, Finished, Progress, RowState, Started
from multimodal_gen.request import Timings, VideoRequest

# Jobs in the engine at once: enough to fill a batch, few enough that the others' requests stay on the disk.
MAX_AT_ONCE = 8
# While the engine takes nothing (it loads, or its queue is full), it is asked again this often.
ASK_AGAIN_S = 0.25
SWEEP_S = 60.0
MAX_CRASHES = 2
ENCODERS = 2

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Whoever counts what happens."""

    def generated(self, timings: Timings, outputs: int) -> None: ...
    def files_encoded(self, seconds: float) -> None: ...
    def job_done(self, outcome: str, seconds: float) -> None: ...
    def job_resumed(self) -> None: ...
    def cancelled(self) -> None: ...


@dataclass
class Running:
    """A job that has left the queue."""

    job: Job
    task: asyncio.Task[None] | None = None  # filled once it is made
    ticket: Ticket | None = None  # filled once the engine has it
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # set once the engine has it, or will not
    started: bool = False  # set when its first row has begun, here or before a restart
    rows: dict[int, int] = field(default_factory=dict)  # row → steps done
    steps: int = 0  # of all rows together; filled when the request is known

    @property
    def progress(self) -> int:
        """0 to 99: the files are still to be made."""
        return math.floor(99 * sum(self.rows.values()) / self.steps) if self.steps else 0


class PutBack(Exception):
    """The job goes back to the queue: the server is about to stop."""


class JobRunner:
    """The jobs of one server; all methods belong to its event loop."""

    def __init__(self, config: ServerConfig, engine: EngineClient) -> None:
        """Opens the folder of the model that is served. Raises: ConfigError."""
        self.config = config
        self.engine = engine
        # Jobs of another model would wait here for ever.
        folder = data_folder(config) / slug(engine.card.name)
        self.files = JobFiles(folder)
        self.jobs = Jobs(Path(folder, "jobs.sqlite"))
        self.disk = OneThread("jobs")
        self.observer: Observer | None = None
        self._waiting: dict[str, Job] = {}
        self._running: dict[str, Running] = {}
        self._unwritten: dict[str, dict[str, Any]] = {}  # columns that the database could not take yet
        self._wake = asyncio.Event()
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []
        self._encoders = asyncio.Semaphore(ENCODERS)

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what the server before this one left, and begin to work."""
        await self.disk(lambda: self.files.sweep(self.jobs.ids()))
        for job in await self.disk(self.jobs.unfinished):
            self._waiting[job.id] = job
        if self._waiting:
            log.info("%d videos go on from the last run of this server", len(self._waiting))
        self._tasks = [asyncio.create_task(self._feed(), name="jobs"), asyncio.create_task(self._sweep(), name="sweep")]
        self._wake.set()

    async def drain(self, timeout_s: float) -> None:
        """Start nothing more; running jobs end with their next checkpoint, or finish, or stop after `timeout_s`."""
        self._draining = True
        for running in list(self._running.values()):
            if running.ticket is not None and not running.ticket.started:
                await self._put_back(running)
        tasks = [running.task for running in self._running.values() if running.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def stop(self) -> None:
        """Put what still runs back into the queue and let go of the database."""
        self._draining = True
        for running in list(self._running.values()):
            await self._put_back(running)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.disk(self.jobs.close)
        self.disk.close()
        self.files.close()

    # --- jobs -----------------------------------------------------------------------------------------------------

    async def add(self, job: Job, request: VideoRequest) -> Job:
        """Accept a job: it is on the disk when this returns. The one of the same key and body is returned instead.

        Raises: ShuttingDown, QueueFull, StorageFull, IdempotencyMismatch.
        """
        if self._draining:
            raise ShuttingDown("The server is shutting down and takes no new requests.")
        await self.disk(self.files.check_room, request)
        accepted = await self.disk(self.jobs.add, job, request, self.config.max_jobs)
        if accepted.id == job.id:
            self._waiting[job.id] = accepted
            self._wake.set()
        return accepted

    async def delete(self, job: Job) -> bool:
        """Stop a job before its next step and forget it and its files; whether it was there. Raises: StorageFull."""
        found = await self.disk(self.jobs.delete, job.id)
        self._waiting.pop(job.id, None)
        self._unwritten.pop(job.id, None)
        running = self._running.pop(job.id, None)
        if running is not None:
            await _end(running)
            if self.observer is not None:
                self.observer.cancelled()
        await self.disk(self.files.discard, job.id)
        self._wake.set()
        return found

    def current(self, job: Job) -> Job:
        """The job with what the database does not know of it yet."""
        running, unwritten = self._running.get(job.id), self._unwritten.get(job.id, {})
        if running is not None and not job.finished:
            unwritten = {"progress": running.progress} | unwritten
        return msgspec.structs.replace(job, **unwritten) if unwritten else job

    def position(self, job: Job) -> int | None:
        """How many jobs are likely to start before this one; None once it has started."""
        running = self._running.get(job.id)
        if job.status != "queued" or (running is not None and running.started):
            return None
        ahead = sum(not other.started for other in self._running.values())
        if running is not None:
            return sum(not other.started and other.job.number < job.number for other in self._running.values())
        return ahead + sum(_rank(other) < _rank(job) for other in self._waiting.values())

    @property
    def waiting(self) -> int:
        """Jobs that have not started."""
        return len(self._waiting) + sum(not running.started for running in self._running.values())

    @property
    def running(self) -> int:
        """Jobs that have started and not ended."""
        return sum(running.started for running in self._running.values())

    # --- the queue ------------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), ASK_AGAIN_S if self._waiting else None)
            self._wake.clear()
            while (job := self._next()) is not None:
                del self._waiting[job.id]
                running = self._running[job.id] = Running(job, started=job.status == "in_progress")
                running.task = asyncio.create_task(self._guarded(running), name=job.id)
                await running.settled.wait()  # the engine counts its cost from then on

    def _next(self) -> Job | None:
        """The job to start now; None while the engine should get no more."""
        engine = self.engine
        if self._draining or not self._waiting or len(self._running) >= MAX_AT_ONCE:
            return None
        if engine.ready is None or engine.state != "ready":
            return None
        job = next_in_turn(self._waiting.values(), [running.job for running in self._running.values()])
        cost = engine.outstanding_cost
        return job if not cost or cost + job.cost <= self.config.max_queue_cost else None

    async def _guarded(self, running: Running) -> None:
        """One job from the queue to its end; nothing it raises is lost."""
        job = running.job
        try:
            await self._run(running)
        except PutBack:
            await self._update(job.id, status="queued", progress=running.progress)
        except CapacityError:  # the engine takes nothing right now
            self._requeue(job)
        except WorkerCrashed as error:
            await self._crashed(running, error)
        except MmgenError as error:
            await self._fail(running, error)
        except Exception:
            log.exception("job %s failed", job.id)
            await self._fail(running, GenerationFailed("The server made a mistake with this video; its log has more."))
        finally:
            running.settled.set()
            if self._running.get(job.id) is running:
                del self._running[job.id]
            self._wake.set()

    async def _run(self, running: Running) -> None:
        job = running.job
        request = await self.disk(self.jobs.request, job.id)
        await self.disk(self.files.begin, job.id)
        states = await self.disk(self.files.resume, job.id)
        running.steps = request.num_inference_steps * request.n
        running.rows = {state.index: state.step for state in states}
        running.ticket = self.engine.submit(request, states)
        running.settled.set()
        if states and self.observer is not None:
            self.observer.job_resumed()
        await self._complete(running, request, await self._follow(running, running.ticket))

    async def _follow(self, running: Running, ticket: Ticket) -> Finished:
        job = running.job
        async for event in ticket:
            if isinstance(event, Started) and job.status == "queued":
                running.started = True
                await self._update(job.id, status="in_progress")
            elif isinstance(event, Progress):
                running.rows[event.index] = event.step
            elif isinstance(event, Checkpoint):
                await self._checkpoint(running, event.state)
                if self._draining:
                    ticket.cancel()
                    raise PutBack
            elif isinstance(event, Finished):
                return event
        raise AssertionError("a ticket's stream ends with Finished or an error")

    async def _checkpoint(self, running: Running, state: RowState) -> None:
        try:
            await self.disk(self.files.save, running.job.id, state)
            await self._update(running.job.id, progress=running.progress)
        except OSError as error:
            # It costs time after a crash, not the video.
            log.error("job %s goes on without its checkpoint: %s", running.job.id, error)

    async def _complete(self, running: Running, request: VideoRequest, finished: Finished) -> None:
        job, ready = running.job, self.engine.ready
        assert ready is not None, "a request was answered"
        if self.observer is not None:
            self.observer.generated(finished.timings, request.n)
        maker = Maker(ready, self.config, self.engine.card)
        began = time.monotonic()
        async with self._encoders:
            for index, frames in enumerate(finished.outputs):
                order = self.files.order(job.id, request, maker.recipe(request, index, finished), job.output_format)
                assert tuple(frames.shape) == order.shape, (frames.shape, order.shape)
                await write_video(order, frames.data)
        if self.observer is not None:
            self.observer.files_encoded(time.monotonic() - began)
        await self._end(running, "completed", progress=100)

    # --- ends -----------------------------------------------------------------------------------------------------

    async def _crashed(self, running: Running, error: WorkerCrashed) -> None:
        """A worker died: the job goes on from its checkpoint, once."""
        job = running.job
        if self.engine.state == "failed":  # the server ends; the next one goes on
            return
        crashes = job.crashes + 1
        if crashes >= MAX_CRASHES:
            await self._fail(
                running, WorkerCrashed(f"{error.message} It was the second time, so it is not tried again.")
            )
            return
        await self._update(job.id, crashes=crashes)
        current = await self.disk(self.jobs.find, job.id)
        if current is not None:
            self._requeue(current)

    def _requeue(self, job: Job) -> None:
        self._waiting[job.id] = job

    async def _fail(self, running: Running, error: MmgenError) -> None:
        log.warning("job %s failed: %s: %s", running.job.id, error.code, error.message)
        await self._end(running, "failed", error_code=error.code, error_message=error.message)

    async def _end(self, running: Running, status: str, **fields: Any) -> None:
        job, now = running.job, int(time.time())
        times = {"completed_at": now, "expires_at": now + math.ceil(self.config.job_ttl_s)}
        if await self._update(job.id, status=status, **times, **fields):
            await self.disk(self.files.discard_checkpoints, job.id)
        if self.observer is not None:
            self.observer.job_done(fields.get("error_code", status), now - job.created_at)

    async def _update(self, job_id: str, **fields: Any) -> bool:
        """Whether the database has it. A disk that is full now must not take down what is computed: what could not be
        written is kept here, shown by `current` and tried again."""
        self._unwritten[job_id] = self._unwritten.get(job_id, {}) | fields
        return await self._write(job_id)

    async def _write(self, job_id: str) -> bool:
        fields = self._unwritten.get(job_id, {})
        try:
            await self.disk(self.jobs.update, job_id, **fields)
        except StorageFull as error:
            log.error("the state of job %s is not written: %s", job_id, error.message)
            return False
        if self._unwritten.get(job_id) is fields:  # nothing was added meanwhile
            del self._unwritten[job_id]
        return True

    async def _put_back(self, running: Running) -> None:
        await _end(running)
        self._running.pop(running.job.id, None)
        await self._update(running.job.id, status="queued", progress=running.progress)

    async def _sweep(self) -> None:
        """Remove what has expired."""
        while True:
            await asyncio.sleep(min(SWEEP_S, self.config.job_ttl_s / 4))
            try:
                for job_id in list(self._unwritten):
                    await self._write(job_id)
                for job in await self.disk(self.jobs.expired, int(time.time())):
                    await self.disk(self.jobs.delete, job.id)
                    await self.disk(self.files.discard, job.id)
            except (StorageFull, OSError) as error:
                log.error("expired videos are not removed: %s", error)


def next_in_turn(waiting: Iterable[Job], running: Iterable[Job]) -> Job:
    """The job to start next: the highest priority, then the user with the fewest running jobs, then the oldest."""
    users = Counter(job.fair_key for job in running)
    return min(waiting, key=lambda job: (-job.priority, users[job.fair_key], job.number))


def _rank(job: Job) -> tuple[int, int]:
    return -job.priority, job.number


async def _end(running: Running) -> None:
    """Stop a job's work here and in the engine."""
    if running.ticket is not None:
        running.ticket.cancel()
    if running.task is not None:
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)
