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
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec

from multimodal_gen.config import ServerConfig, data_folder
from multimodal_gen.engine.client import EngineClient
from multimodal_gen.engine.job_files import JobFiles
from multimodal_gen.engine.job_queue import JobQueue, Running
from multimodal_gen.engine.job_rows import JobRows
from multimodal_gen.engine.job_writer import JobWriter
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
from multimodal_gen.media.orders import WriteVideo
from multimodal_gen.messages import Checkpoint, Finished, Frames, Progress, RowState, Started
from multimodal_gen.request import Timings, VideoRequest

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


class PutBack(Exception):
    """The job goes back to the queue: the server is about to stop, or to sleep."""


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
        self.queue = JobQueue()
        self._rows = JobRows(self.jobs, self.disk)
        self._wake = asyncio.Event()
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []
        self._encoders = asyncio.Semaphore(max(ENCODERS, config.dp_size))  # each replica decodes one video at a time

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what the server before this one left, and begin to work."""
        await self.disk(lambda: self.files.sweep(self.jobs.ids()))
        for job in await self.disk(self.jobs.unfinished):
            self.queue.waiting[job.id] = job
        if self.queue.waiting:
            log.info("%d videos go on from the last run of this server", len(self.queue.waiting))
        self._tasks = [
            asyncio.create_task(self._feed(), name="queue"),
            asyncio.create_task(self._sweep(), name="sweep"),
        ]
        for task in self._tasks:
            task.add_done_callback(_report)
        self._wake.set()

    async def drain(self, timeout_s: float) -> None:
        """Start nothing more; running jobs end with their next checkpoint, or finish, or stop after `timeout_s`."""
        self._draining = True
        for running in list(self.queue.running.values()):
            if running.ticket is not None and not running.ticket.started:
                await self._put_back(running)
        tasks = [running.task for running in self.queue.running.values() if running.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def rest(self) -> None:
        """The engine is about to sleep: what it has not begun waits here, and running jobs end with their next
        checkpoint, or finish. All go on when it is woken.
        """
        for running in list(self.queue.running.values()):
            if running.ticket is not None and not running.ticket.started:
                await self._put_back(running)
                await self._wait_again(running.job.id)

    async def stop(self) -> None:
        """Put what still runs back into the queue and let go of the database."""
        self._draining = True
        for running in list(self.queue.running.values()):
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

        Raises: ShuttingDown, Asleep, QueueFull, StorageFull, IdempotencyMismatch.
        """
        if self.engine.state == "asleep":
            self.engine.check_open()
        if self._draining:
            raise ShuttingDown("The server is shutting down and takes no new requests.")
        await self.disk(self.files.check_room, request)
        accepted = await self.disk(self.jobs.add, job, request, self.config.max_jobs)
        if accepted.id == job.id:
            self.queue.waiting[job.id] = accepted
            self._wake.set()
        return accepted

    async def delete(self, job: Job) -> bool:
        """Stop a job before its next step and forget it and its files; whether it was there. Raises: StorageFull."""
        try:
            found = await self.disk(self.jobs.delete, job.id)
        except StorageFull:  # its own files may be what fills the disk
            await self.disk(self.files.discard, job.id)
            found = await self.disk(self.jobs.delete, job.id)
        self.queue.waiting.pop(job.id, None)
        self._rows.forget(job.id)
        running = self.queue.running.pop(job.id, None)
        if running is not None:
            await running.end()
            if self.observer is not None:
                self.observer.cancelled()
        await self.disk(self.files.discard, job.id)
        self._wake.set()
        return found

    def current(self, job: Job) -> Job:
        """A job from the database, as it is at this moment."""
        running = self.queue.running.get(job.id)
        if running is not None and not job.finished:
            job = msgspec.structs.replace(job, progress=max(running.progress, job.progress))
        return self._rows.current(job)

    # --- the queue ------------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), ASK_AGAIN_S if self.queue.waiting else None)
            self._wake.clear()
            while (running := self._next()) is not None:
                running.task = asyncio.create_task(self._guarded(running), name=running.job.id)
                await running.settled.wait()  # the engine counts its cost from then on

    def _next(self) -> Running | None:
        engine = self.engine
        if self._draining or engine.ready is None or engine.state != "ready":
            return None
        return self.queue.take(engine.admitted.pictures_cost, self.config.max_queue_cost)

    async def _guarded(self, running: Running) -> None:
        """One job from the queue to its end; nothing it raises is lost."""
        job = running.job
        try:
            await self._run(running)
        except PutBack:
            await self._rows.update(job.id, status="queued", progress=running.progress)
            await self._wait_again(job.id)
        except CapacityError:  # the engine takes nothing right now
            self.queue.waiting[job.id] = job
        except WorkerCrashed as error:
            await self._crashed(running, error)
        except MmgenError as error:
            await self._fail(running, error)
        except Exception:
            log.exception("job %s failed", job.id)
            await self._fail(running, GenerationFailed("The server made a mistake with this video; its log has more."))
        finally:
            running.settled.set()
            if self.queue.running.get(job.id) is running:
                del self.queue.running[job.id]
            self._wake.set()

    async def _run(self, running: Running) -> None:
        job = running.job
        request = await self.disk(self.jobs.request, job.id)
        await self.disk(self.files.begin, job.id)
        states = await self.disk(self.files.resume, job.id)
        running.steps = request.num_inference_steps * request.n
        running.rows = {state.index: state.step for state in states}
        request = msgspec.structs.replace(request, stream_frames=True)
        running.ticket = self.engine.submit(request, states)
        running.settled.set()
        if states and self.observer is not None:
            self.observer.job_resumed()
        writer = JobWriter(partial(self._order, job, request), self._encoders)
        try:
            finished = await self._follow(running, running.ticket, writer)
        finally:
            await writer.close()
        if self.observer is not None:
            self.observer.generated(finished.timings, request.n)
            self.observer.files_encoded(writer.seconds)
        await self._end(running, "completed", progress=100)

    def _order(self, job: Job, request: VideoRequest, index: int, merged: tuple[str, ...]) -> WriteVideo:
        """What makes the files of an output."""
        ready = self.engine.ready
        assert ready is not None, "a request was answered"
        recipe = Maker(ready, self.config, self.engine.card).recipe(request, index, merged)
        return self.files.order(job.id, request, recipe, job.output_format)

    async def _follow(self, running: Running, ticket: Ticket, writer: JobWriter) -> Finished:
        job = running.job
        async for event in ticket:
            if isinstance(event, Started) and job.status == "queued":
                running.started = True
                await self._rows.update(job.id, status="in_progress")
            elif isinstance(event, Progress):
                running.rows[event.index] = event.step
            elif isinstance(event, Checkpoint):
                await self._checkpoint(running, event.state)
                if self._draining or self.engine.state == "asleep":
                    ticket.cancel()
                    raise PutBack
            elif isinstance(event, Frames):
                await self._write(writer, event, ticket)
            elif isinstance(event, Finished):
                return event
        raise AssertionError("a ticket's stream ends with Finished or an error")

    async def _write(self, writer: JobWriter, frames: Frames, ticket: Ticket) -> None:
        try:
            await writer.take(frames)
        except BaseException:  # nobody needs the other frames
            ticket.cancel()
            raise

    async def _checkpoint(self, running: Running, state: RowState) -> None:
        try:
            await self.disk(self.files.save, running.job.id, state)
            await self._rows.update(running.job.id, progress=running.progress)
        except OSError as error:
            # It costs time after a crash, not the video.
            log.error("job %s goes on without its checkpoint: %s", running.job.id, error)

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
        await self._rows.update(job.id, crashes=crashes)
        await self._wait_again(job.id)

    async def _wait_again(self, job_id: str) -> None:
        """Back to the queue, as it is now; unless it has been deleted."""
        current = await self.disk(self.jobs.find, job_id)
        if current is not None:
            self.queue.waiting[job_id] = current

    async def _fail(self, running: Running, error: MmgenError) -> None:
        log.warning("job %s failed: %s: %s", running.job.id, error.code, error.message)
        await self._end(running, "failed", error_code=error.code, error_message=error.message)

    async def _end(self, running: Running, status: str, **fields: Any) -> None:
        job, now = running.job, int(time.time())
        times = {"completed_at": now, "expires_at": now + math.ceil(self.config.job_ttl_s)}
        if await self._rows.update(job.id, status=status, **times, **fields):
            await self.disk(self.files.discard_checkpoints, job.id)
        if self.observer is not None:
            self.observer.job_done(fields.get("error_code", status), now - job.created_at)

    async def _put_back(self, running: Running) -> None:
        await running.end()
        self.queue.running.pop(running.job.id, None)
        await self._rows.update(running.job.id, status="queued", progress=running.progress)

    async def _sweep(self) -> None:
        """Remove what has expired."""
        while True:
            await asyncio.sleep(min(SWEEP_S, self.config.job_ttl_s / 4))
            try:
                await self._rows.retry()
                for job in await self.disk(self.jobs.expired, int(time.time())):
                    await self.disk(self.jobs.delete, job.id)
                    await self.disk(self.files.discard, job.id)
            except (StorageFull, OSError) as error:
                log.error("expired videos are not removed: %s", error)


def _report(task: asyncio.Task[None]) -> None:
    """A loop of ours that ends by itself is a mistake of ours, and must not go unseen."""
    if not task.cancelled() and task.exception() is not None:
        log.critical("the %s of videos ended; restart the server", task.get_name(), exc_info=task.exception())
