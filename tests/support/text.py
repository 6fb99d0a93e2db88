"""Text requests, a clock that tests set, and a model that only remembers what is in which page."""

from __future__ import annotations

import zlib
from collections.abc import Collection

from multimodal_gen.llm.holdings import Holdings
from multimodal_gen.llm.scheduler import Limits, TextScheduler
from multimodal_gen.llm.sequence import Sequence, Slot
from multimodal_gen.text import TextRequest


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def text_request(name: str, prompt: Collection[int] = range(10), max_tokens: int = 8, **more: object) -> TextRequest:
    return TextRequest(id=name, prompt=tuple(prompt), max_tokens=max_tokens, **more)


class Stepper:
    """Drives a scheduler as the core does; checks that every sequence finds its own past in its pages.

    What a page should hold of a token is a hash of all tokens up to it and of the adapter, as keys and values are.
    """

    def __init__(
        self,
        pages: int = 64,
        page_size: int = 4,
        step_tokens: int = 32,
        sequences: int = 8,
        adapters: int = 8,
        policy: str = "fcfs",
        prefix_cache: bool = True,
        lengths: dict[tuple[str, int], int] | None = None,
    ) -> None:
        """`lengths`: tokens after which an answer ends; the others take all that they may."""
        self.clock = Clock()
        self.holdings = Holdings(pages, page_size, prefix_cache=prefix_cache)
        self.scheduler = TextScheduler(Limits(step_tokens, sequences, adapters, policy), self.holdings, self.clock)
        self.limits = self.scheduler.limits
        self.lengths = lengths or {}
        self.finished: list[tuple[str, int]] = []
        self.answers: dict[tuple[str, int], list[int]] = {}
        self.read = 0  # tokens
        self._memory: dict[int, int] = {}

    def step(self, seconds: float = 0.1) -> list[Slot]:
        """One step; returns what was planned."""
        self.clock.now += seconds
        slots = self.scheduler.plan()
        self._check(slots)
        for slot in slots:
            self._compute(slot)
        self.scheduler.advance(slots)
        for slot in slots:
            sequence = slot.sequence
            if not sequence.remaining:
                past = _past(sequence)
                sequence.tokens.append(hash((past[-1], sequence.index)) % 3)
                if sequence.generated == self.lengths.get(sequence.key, sequence.request.max_tokens):
                    self.answers[sequence.key] = sequence.tokens[len(sequence.request.prompt) :]
                    self.scheduler.finish(sequence)
                    self.finished.append(sequence.key)
        return slots

    def run(self, steps: int = 10_000) -> None:
        """Until nothing is left."""
        for _ in range(steps):
            if self.scheduler.idle:
                return
            self.step()
        raise AssertionError(f"after {steps} steps {self.scheduler.running_ids, self.scheduler.queued_ids} are left")

    def _check(self, slots: list[Slot]) -> None:
        assert slots or self.scheduler.idle, "a step with nothing in it, although something waits"
        writing = sum(slot.sequence.decoding for slot in slots)
        most = self.limits.step_tokens
        assert sum(slot.count for slot in slots) <= max(most, writing + max(1, most // 2))
        assert len(self.scheduler.running) <= self.limits.sequences
        assert len({slot.sequence.request.adapter for slot in slots}) <= self.limits.adapters
        assert len({slot.sequence.key for slot in slots}) == len(slots)

    def _compute(self, slot: Slot) -> None:
        sequence, size = slot.sequence, self.holdings.page_size
        past, pages = _past(sequence), sequence.pages
        places = [pages[at // size] * size + at % size for at in range(sequence.computed + slot.count)]
        for at in range(sequence.computed):
            assert self._memory[places[at]] == past[at], f"{sequence.key} finds another's past at {at}"
        for at in range(sequence.computed, len(places)):
            assert self.holdings.pool.references(pages[at // size]) == 1, "a shared page is written"
            self._memory[places[at]] = past[at]
        self.read += slot.count


def _past(sequence: Sequence) -> list[int]:
    found = zlib.crc32((sequence.request.adapter or "").encode())
    return [found := hash((found, token)) for token in sequence.tokens]
