"""Which rows run next, decided anew before every denoising step. Pure Python: no torch, no clocks, no I/O.

Order: priority, then fair share by key, then urgent deadlines, then earliest virtual finish. A deadline is urgent in
its last half minute, and passes only requests of its own key: asking for one must not be a way to jump the queue. The
virtual finish of a request is the work that the machine had done when it arrived plus its own cost, in token-steps (as
in weighted fair queueing, Demers et al., 1989): equal requests run in order of arrival, a small one passes a large one,
and a large one is passed by no more work than its own, so nobody starves.

A step is filled in that order up to a budget of tokens; a row that does not fit lets the ones behind it pass, but the
first in line always runs. Requests wait as requests and become rows only when their first step is planned.

Rows of one step share one state of the model's weights (which adapters are merged into them). As long as rows run, the
state is theirs, and rows of the same state join them; once the first in line waits for another state, nobody joins any
more, and the state changes when those that run are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from multimodal_gen.request import GenerationRequest

URGENT_SECONDS = 30.0


@dataclass
class Job:
    """One request inside the scheduler."""

    request: GenerationRequest  # filled by add
    finish: int  # filled by add: virtual finish, in token-steps
    deadline: float  # filled by add: clock time, infinite where the user set none
    tokens: int  # filled by add from the request's estimate, corrected by set_tokens
    weights: Hashable  # filled by add: the state of the model's weights that its rows need
    waiting: list[int] = field(default_factory=list)  # image indices not yet started
    running: list[int] = field(default_factory=list)  # image indices between prepare and the last step
    decoding: list[int] = field(default_factory=list)  # image indices whose steps are done

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id


@dataclass(frozen=True)
class Slot:
    """One row of a planned step."""

    request_id: str
    index: int
    starts: bool  # whether the row must be encoded and prepared first


class Scheduler:
    """Continuous batching over denoising steps."""

    def __init__(self, max_batch_tokens: int, exclusive: bool, clock: Callable[[], float]) -> None:
        """
        Args:
            max_batch_tokens: transformer tokens per step; a single larger row still runs, alone.
            exclusive: the model runs one row at a time, from its first step to its last.
            clock: monotonic seconds, for deadlines.
        """
        self.max_batch_tokens = max_batch_tokens
        self.exclusive = exclusive
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._work = 0  # token-steps planned since start: the virtual time
        self._served: dict[str, float] = {}  # fair key → virtual time: token-steps served since it became active

    def add(self, request: GenerationRequest, weights: Hashable = ()) -> None:
        """Queue a request. A key that was idle starts level with the least served active one, with no credit."""
        assert request.id not in self._jobs, f"request {request.id} was added twice"
        key = request.fair_key
        if all(job.request.fair_key != key for job in self._jobs.values()):
            active = [self._served[job.request.fair_key] for job in self._jobs.values()]
            self._served[key] = min(active, default=0.0)
        deadline = math.inf if request.deadline_s is None else self._clock() + request.deadline_s
        self._jobs[request.id] = Job(
            request, self._work + request.cost, deadline, request.row_tokens, weights, waiting=list(range(request.n))
        )

    def remove(self, request_id: str) -> None:
        """Forget a request, whatever it was doing."""
        job = self._jobs.pop(request_id)
        key = job.request.fair_key
        if all(other.request.fair_key != key for other in self._jobs.values()):
            del self._served[key]

    def decode(self, request_id: str, index: int) -> None:
        """The steps of a row are done; it is planned no more."""
        job = self._jobs[request_id]
        job.running.remove(index)
        job.decoding.append(index)

    def finish(self, request_id: str, index: int) -> bool:
        """A row is done; returns whether it was the request's last, which is then forgotten."""
        job = self._jobs[request_id]
        (job.decoding if index in job.decoding else job.running).remove(index)
        if job.running or job.waiting or job.decoding:
            return False
        self.remove(request_id)
        return True

    def tokens(self, request_id: str) -> int:
        """Transformer tokens per step of one row of the request."""
        return self._jobs[request_id].tokens

    def set_tokens(self, request_id: str, tokens: int) -> None:
        """The exact count, once the prompt has been encoded."""
        self._jobs[request_id].tokens = tokens

    def expired(self) -> list[str]:
        """Requests whose deadline has passed."""
        now = self._clock()
        return [job.id for job in self._jobs.values() if job.deadline < now]

    def plan(self, most_tokens: int | None = None) -> list[Slot]:
        """Rows of the next step, of at most so many tokens together but one row at least. Rows that start here count as
        running from now on."""
        chosen: list[Slot] = []
        budget = self.max_batch_tokens if most_tokens is None else min(most_tokens, self.max_batch_tokens)
        now = self._clock()
        jobs = sorted(self._jobs.values(), key=lambda job: self._rank(job, now))
        joining = self._joining(jobs)
        for job in jobs:
            tokens = job.tokens
            started = [(index, False) for index in job.running]
            waiting = job.waiting if job.weights == joining else []
            for index, starts in started + [(index, True) for index in waiting]:
                if self.exclusive and (chosen or (starts and self._busy())):
                    break
                if chosen and tokens > budget:
                    break
                chosen.append(Slot(job.id, index, starts))
                budget -= tokens
        for slot in chosen:
            job = self._jobs[slot.request_id]
            if slot.starts:
                job.waiting.remove(slot.index)
                job.running.append(slot.index)
            self._served[job.request.fair_key] += job.tokens
            self._work += job.tokens
        return chosen

    def _joining(self, jobs: list[Job]) -> Hashable | None:
        """The state of the weights whose rows may start now, given the jobs, best first; None: nobody may."""
        first = next((job for job in jobs if job.waiting), None)
        running = next((job for job in jobs if job.running), first)
        if first is None or running is None or first.weights != running.weights:
            return None
        return first.weights

    def _rank(self, job: Job, now: float) -> tuple[bool, int, float, float, int]:
        # An exclusive model's running row goes first whatever its rank: it cannot be paused for another.
        first = not (self.exclusive and (job.running or job.decoding))
        urgent = job.deadline if job.deadline - now < URGENT_SECONDS else math.inf
        return first, -job.request.priority, self._served[job.request.fair_key], urgent, job.finish

    def _busy(self) -> bool:
        return any(job.running or job.decoding for job in self._jobs.values())

    @property
    def steps(self) -> bool:
        """Whether a denoising step has rows."""
        return any(job.running or job.waiting for job in self._jobs.values())

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._jobs

    @property
    def running_ids(self) -> list[str]:
        """Requests with rows that have begun."""
        return [job.id for job in self._jobs.values() if job.running or job.decoding]

    @property
    def queued_ids(self) -> list[str]:
        """Requests with none."""
        return [job.id for job in self._jobs.values() if not (job.running or job.decoding)]

    @property
    def running_rows(self) -> int:
        """Rows between their first and last step."""
        return sum(len(job.running) for job in self._jobs.values())

    @property
    def waiting_rows(self) -> int:
        """Rows not yet started."""
        return sum(len(job.waiting) for job in self._jobs.values())
