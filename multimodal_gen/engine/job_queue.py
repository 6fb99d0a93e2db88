"""Which jobs wait, which run, and whose turn it is. What is here is in memory only, and is found again at a start."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from multimodal_gen.engine.jobs import Job
from multimodal_gen.engine.ticket import Ticket

# Jobs in the engine at once: enough to fill a batch, few enough that the others' requests stay on the disk.
MAX_AT_ONCE = 8


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

    async def end(self) -> None:
        """Stop the work on it, here and in the engine."""
        if self.ticket is not None:
            self.ticket.cancel()
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


@dataclass
class JobQueue:
    """The unfinished jobs of one server, by id."""

    waiting: dict[str, Job] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)

    def take(self, outstanding_cost: int, max_cost: int) -> Running | None:
        """Move the job whose turn it is to the running ones; None while the engine should get no more."""
        if not self.waiting or len(self.running) >= MAX_AT_ONCE:
            return None
        job = next_in_turn(self.waiting.values(), [running.job for running in self.running.values()])
        if outstanding_cost and outstanding_cost + job.cost > max_cost:
            return None
        del self.waiting[job.id]
        running = self.running[job.id] = Running(job, started=job.status == "in_progress")
        return running

    def position(self, job: Job) -> int | None:
        """How many jobs are likely to start before this one; None once it has started."""
        own = self.running.get(job.id)
        if job.status != "queued" or (own is not None and own.started):
            return None
        soon = [running.job for running in self.running.values() if not running.started]
        if own is not None:
            return sum(other.number < job.number for other in soon)
        return len(soon) + sum(_rank(other) < _rank(job) for other in self.waiting.values())

    @property
    def unstarted(self) -> int:
        """How many jobs have not begun."""
        return len(self.waiting) + sum(not running.started for running in self.running.values())

    @property
    def started(self) -> int:
        """How many jobs have begun and not ended."""
        return sum(running.started for running in self.running.values())


def next_in_turn(waiting: Iterable[Job], running: Iterable[Job]) -> Job:
    """The job to start next: the highest priority, then the user with the fewest running jobs, then the oldest."""
    users = Counter(job.fair_key for job in running)
    return min(waiting, key=lambda job: (-job.priority, users[job.fair_key], job.number))


def _rank(job: Job) -> tuple[int, int]:
    return -job.priority, job.number
