"""What is told of a text engine: its state, and counters since its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multimodal_gen.llm.holdings import Holdings
from multimodal_gen.llm.scheduler import TextScheduler
from multimodal_gen.llm.sequence import Slot
from multimodal_gen.llm.writing import Writing
from multimodal_gen.messages import TextGauges


@dataclass
class Counts:
    """Kept by the core."""

    prompt_tokens: int = 0  # of requests that have their first token
    cached_tokens: int = 0  # of them, those that were in the prefix cache
    generated_tokens: int = 0
    rows: int = 0  # this and the next two: of the latest step
    tokens: int = 0
    seconds: float = 0.0

    def note(self, writing: Writing) -> None:
        """The request has one more token; to be called before it knows."""
        if writing.first is None:
            self.prompt_tokens += len(writing.request.prompt)
            self.cached_tokens += writing.cached
        self.generated_tokens += 1

    def note_step(self, slots: Sequence[Slot], seconds: float) -> None:
        """A step is over."""
        self.rows, self.tokens, self.seconds = len(slots), sum(slot.count for slot in slots), seconds

    def gauges(self, scheduler: TextScheduler, holdings: Holdings) -> TextGauges:
        """All of it, for the front."""
        return TextGauges(
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            kv_pages=holdings.pool.pages,
            kv_pages_used=holdings.pool.used - holdings.tree.unlocked,
            kv_pages_cached=holdings.tree.unlocked,
            step_seconds=self.seconds,
            step_rows=self.rows,
            step_tokens=self.tokens,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=scheduler.preemptions,
        )
