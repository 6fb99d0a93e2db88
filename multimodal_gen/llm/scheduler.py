"""Which tokens are computed next, decided anew before every step. Pure Python: no torch, no clocks of its own, no I/O.

A step goes on with every sequence that writes, one token each, and fills up with pieces of prompts: of sequences that
have begun to read, then of those that start, in the order of the policy (`policies.py`). So a long prompt never holds
the others up for more than `step_tokens` (chunked prefill: Agrawal et al., 2023). Where more adapters are wanted than a
step may have, they take turns (`adapter_turns.py`).

When pages run out, sequences give theirs up and are read again later (preemption by recompute): those of the lowest
priority, and among these the newest. In the order of arrival keys take turns by what their requests may cost
(start-time fair queueing: Goyal et al., 1996): a request is tagged with the virtual time at which it may start, the
time of its key moves on by its cost, and that of all is the tag of the request that started last.

Everything is kept in order of insertion and depends on calls and the turn's clock alone: several ranks plan alike.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from multimodal_gen.llm.adapter_turns import Adapter, AdapterTurns
from multimodal_gen.llm.holdings import Holdings
from multimodal_gen.llm.policies import POLICIES, View, arrival, level
from multimodal_gen.llm.sequence import Job, Sequence, Slot
from multimodal_gen.text import TextRequest

KEEP_SECONDS = 1.0  # of waiting; then nobody starts before a request whose adapter does not compute at all
ECHO_TOKENS = 128  # of a step, where logits of all of them are wanted: a row is as wide as the vocabulary


@dataclass(frozen=True)
class Limits:
    """What one step may have; settled by the core from the settings."""

    step_tokens: int  # that the model reads; more where many write, since half of it is for prompts all the same
    sequences: int  # that run at once
    adapters: int  # different ones, the base model counted as one
    policy: str = "fcfs"  # row of `policies.POLICIES`


class TextScheduler:
    """Continuous batching over tokens."""

    def __init__(self, limits: Limits, holdings: Holdings, clock: Callable[[], float]) -> None:
        """`clock`: seconds, for deadlines and waiting; the same on all ranks."""
        self.limits, self.holdings = limits, holdings
        self.preemptions = 0  # since the start
        self._clock = clock
        self._policy = POLICIES[limits.policy]
        self._turns = AdapterTurns(limits.adapters)
        self._jobs: dict[str, Job] = {}
        self._running: dict[tuple[str, int], Sequence] = {}
        self._added = 0
        self._virtual = 0.0  # tokens
        self._keys: dict[str, float] = {}  # fair key with requests here → virtual time at which its next one may start

    # --- requests ---------------------------------------------------------------------------------------------------

    def fits(self, request: TextRequest) -> bool:
        """Whether one answer has room when it is alone."""
        return len(request.prompt) + request.max_tokens <= self.holdings.tokens

    def add(self, request: TextRequest) -> None:
        """Queue a request. A key that was idle starts level with the others, with no credit."""
        assert request.id not in self._jobs, f"request {request.id} was added twice"
        assert self.fits(request), f"request {request.id} can never run"
        now, key = self._clock(), request.fair_key
        tag = max(self._virtual, self._keys.get(key, 0.0))
        self._keys[key] = tag + request.cost
        deadline = math.inf if request.deadline_s is None else now + request.deadline_s
        self._jobs[request.id] = Job(request, self._added, now, deadline, tag, deque(range(request.n)))
        self._added += 1

    def remove(self, request_id: str, *, spoilt: bool = False) -> None:
        """Forget a request, whatever it was doing; `spoilt`: its keys and values are no good to anybody."""
        job = self._jobs.pop(request_id)
        for sequence in [one for one in self._running.values() if one.request.id == request_id]:
            self.holdings.close(sequence, spoilt=spoilt)
            del self._running[sequence.key]
        if all(other.request.fair_key != job.request.fair_key for other in self._jobs.values()):
            del self._keys[job.request.fair_key]

    def finish(self, sequence: Sequence) -> bool:
        """An answer is complete; returns whether it was the request's last, which is then forgotten."""
        job = self._jobs[sequence.request.id]
        self.holdings.close(sequence)
        del self._running[sequence.key]
        job.running -= 1
        if job.running or job.waiting:
            return False
        self.remove(job.id)
        return True

    def expired(self) -> list[str]:
        """Requests whose deadline has passed."""
        now = self._clock()
        return [job.id for job in self._jobs.values() if job.deadline < now]

    # --- steps ------------------------------------------------------------------------------------------------------

    def plan(self) -> list[Slot]:
        """What the next step reads: those that write first. All pages that it needs are there."""
        now = self._clock()
        line = sorted(self._running.values(), key=lambda sequence: self._rank(sequence, now))
        waiting = self._startable()
        running = [sequence.request.adapter for sequence in line]
        turn = self._turns.choose([*running, *(job.request.adapter for job in waiting)])
        slots = self._fill(line, waiting, turn, now)
        if not slots and self._running:  # those whose turn it is find no pages: it is the turn of those who have some
            turn = self._turns.choose(sequence.request.adapter for sequence in self._running.values())
            slots = self._fill(line, [], turn, now)
        elif not slots and waiting:  # all is kept for one whose turn it is not: it is now
            first = min(waiting, key=lambda job: job.arrived).request.adapter
            same = [job for job in waiting if job.request.adapter == first]
            slots = self._fill(line, same, self._turns.choose([first]), now)
        return slots

    def _fill(self, line: list[Sequence], waiting: list[Job], turn: Collection[Adapter], now: float) -> list[Slot]:
        """A step of sequences whose adapters have their turn."""
        before = self.preemptions
        line = [sequence for sequence in line if sequence.key in self._running]
        slots = self._write(line, turn)
        # However many write, half a step is for prompts: else those that come would wait for those that are there.
        budget = max(1, self.limits.step_tokens - len(slots), self.limits.step_tokens // 2)
        budget -= self._read(slots, line, turn, budget)
        if self.preemptions == before:  # what was given up a moment ago must not be taken by others
            self._start(slots, waiting, turn, budget, now)
        return slots

    def advance(self, slots: list[Slot]) -> None:
        """The step is done: the keys and values of its tokens are there."""
        for slot in slots:
            sequence, job = slot.sequence, self._jobs[slot.sequence.request.id]
            first = slot.completes and not job.read  # once it is committed, nothing of it remains to be read
            self.holdings.commit(sequence, sequence.computed + slot.count)
            if first:
                job.read = True
                self.holdings.pin(sequence)

    def _write(self, line: list[Sequence], turn: Collection[Adapter]) -> list[Slot]:
        """Sequences that write, best first; where a page is missing, the last in line gives up its own."""
        slots = list[Slot]()
        for sequence in [one for one in line if one.decoding and one.request.adapter in turn]:
            while sequence.key in self._running:
                if self.holdings.grow(sequence, len(sequence.tokens)):
                    slots.append(Slot(sequence, 1, 1))
                    break
                self._preempt_last(line)
        return slots

    def _read(self, slots: list[Slot], line: list[Sequence], turn: Collection[Adapter], budget: int) -> int:
        """Go on with prompts, best first; returns tokens. Missing pages are waited for where anything else goes on."""
        tokens = 0
        for sequence in [one for one in line if not one.decoding and one.request.adapter in turn]:
            while sequence.key in self._running and self._room(sequence) <= 0 and not slots:
                self._preempt_last(line)
            if sequence.key in self._running and self._room(sequence) > 0 and tokens < budget:
                slots.append(self._piece(sequence, min(budget - tokens, self._room(sequence))))
                tokens += slots[-1].count
        return tokens

    def _preempt_last(self, line: list[Sequence]) -> None:
        """Whoever is last in line gives up its pages; one that is alone has them all, those that are pinned, too."""
        if len(self._running) == 1 and self.holdings.tree.pinned:
            self.holdings.tree.unpin_all()
        else:
            assert len(self._running) > 1, "a sequence that is alone fits"
            self._preempt(line.pop())

    def _startable(self) -> list[Job]:
        """Jobs that wait and may start."""
        full = len(self._running) >= self.limits.sequences
        return [] if full else [job for job in self._jobs.values() if job.startable]

    def _start(self, slots: list[Slot], waiting: list[Job], turn: Collection[Adapter], budget: int, now: float) -> None:
        """Start what waits, best first, as long as there is room; the first that finds none holds up all behind it.

        So does one that has waited for some time for the turn of an adapter that nobody runs with: what others leave is
        kept for it.
        """
        if not any(job.request.adapter in turn for job in waiting) or budget <= 0:
            return
        running = {sequence.request.adapter for sequence in self._running.values()}
        reserved = sum(self._outstanding(sequence) for sequence in self._running.values())
        keys = Counter(one.request.routing_key for one in self._running.values() if one.request.routing_key is not None)
        for job in self._policy(waiting, View(now, lambda job: self.holdings.measure(job.request), keys)):
            if job.request.adapter not in turn:
                if now - job.arrived >= KEEP_SECONDS and job.request.adapter not in running:
                    return
                continue
            while job.startable:
                if budget <= 0 or len(self._running) >= self.limits.sequences:
                    return
                sequence = self._next(job)
                if self._running and self._outstanding(sequence) + reserved > self.holdings.room:
                    self._put_back(job, sequence)
                    return
                self._running[sequence.key] = sequence
                job.running += 1
                self._virtual = max(self._virtual, job.tag)
                if self._room(sequence) <= 0:  # alone, with nothing but pins in the way
                    self.holdings.tree.unpin_all()
                slots.append(self._piece(sequence, min(budget, self._room(sequence))))
                budget -= slots[-1].count
                reserved += self._outstanding(sequence)

    # --- sequences --------------------------------------------------------------------------------------------------

    def _piece(self, sequence: Sequence, tokens: int) -> Slot:
        """The next tokens of a prompt, at most so many, for which there is room."""
        echo = sequence.request.prompt_logprobs and sequence.index == 0 and sequence.generated == 0
        count = min(tokens, sequence.remaining, ECHO_TOKENS if echo else tokens)
        grown = self.holdings.grow(sequence, sequence.computed + count)
        assert grown, "the room was counted before"
        return Slot(sequence, count, count if echo else int(count == sequence.remaining))

    def _room(self, sequence: Sequence) -> int:
        """Tokens that it can read before pages run out."""
        return (len(sequence.pages) + self.holdings.room) * self.holdings.page_size - sequence.computed

    def _outstanding(self, sequence: Sequence) -> int:
        """Pages that it will want soon: for all that it has to read, and one to write on."""
        return self.holdings.pages_for(len(sequence.tokens)) + 1 - len(sequence.pages)

    def _next(self, job: Job) -> Sequence:
        """The job's next sequence, with what the tree has of it."""
        if job.preempted:
            sequence = job.preempted.pop(0)
            self.holdings.open(sequence)
            return sequence
        request = job.request
        sequence = Sequence(request, job.fresh.popleft(), self.holdings.owner(request), list(request.prompt))
        self.holdings.open(sequence)
        sequence.cached = sequence.computed
        return sequence

    def _put_back(self, job: Job, sequence: Sequence) -> None:
        self.holdings.close(sequence)
        if sequence.generated or sequence.index in (one.index for one in job.preempted):
            job.preempted.insert(0, sequence)
        else:
            job.fresh.appendleft(sequence.index)

    def _preempt(self, sequence: Sequence) -> None:
        job = self._jobs[sequence.request.id]
        self.holdings.close(sequence)
        del self._running[sequence.key]
        job.running -= 1
        job.preempted = sorted([*job.preempted, sequence], key=lambda one: one.index)
        self.preemptions += 1

    def _rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        """Best first: who is preempted last."""
        job = self._jobs[sequence.request.id]
        return -level(job, now), *arrival(job), sequence.index

    # --- what is told -----------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._jobs

    @property
    def running(self) -> list[Sequence]:
        """Sequences that have pages, in order of their start."""
        return list(self._running.values())

    @property
    def waiting(self) -> int:
        """Answers that have not started, or gave their pages up."""
        return sum(job.waiting for job in self._jobs.values())

    @property
    def running_ids(self) -> list[str]:
        """Requests that have pages."""
        return list(dict.fromkeys(request_id for request_id, _ in self._running))

    @property
    def queued_ids(self) -> list[str]:
        """Requests that have none."""
        return [job.id for job in self._jobs.values() if not job.running]
