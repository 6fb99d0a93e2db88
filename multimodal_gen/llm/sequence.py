"""Requests and their answers as the scheduler sees them: lengths, pages, and where they stand. No torch."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from multimodal_gen.llm.prefix_cache import Node, Owner
from multimodal_gen.text import TextRequest


@dataclass(eq=False)
class Sequence:
    """One answer under way. 0 ≤ computed < len(tokens): the last token's keys and values are always still to come."""

    request: TextRequest
    index: int  # of the choice
    owner: Owner  # filled by Holdings.open: in which tree its pages are found
    tokens: list[int]  # prompt and answer so far; the core appends
    computed: int = 0  # tokens whose keys and values are in its pages; moved by Holdings and Scheduler.advance
    pages: list[int] = field(default_factory=list)  # of its tokens, in order; kept by Holdings
    path: list[Node] = field(default_factory=list)  # those that are in the tree, from the start; the others are its own
    cached: int = 0  # tokens of the prompt that were found in the tree at its first start; by Scheduler
    number: int = field(default_factory=itertools.count().__next__)  # no other sequence of this process has it

    @property
    def key(self) -> tuple[str, int]:
        """Names it among all."""
        return self.request.id, self.index

    @property
    def remaining(self) -> int:
        """Tokens that the model has not read: one in decoding."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def decoding(self) -> bool:
        """Whether a step of one token goes on with it. After a preemption it reads its tokens again first."""
        return self.remaining == 1 and self.computed > 0

    @property
    def still(self) -> int:
        """Tokens of the answer that may yet come."""
        return self.request.max_tokens - self.generated


@dataclass(eq=False)
class Job:
    """One request in the scheduler. It waits as a whole, and becomes sequences as they start."""

    request: TextRequest
    number: int  # filled by add: requests before it, since the start
    arrived: float  # filled by add: clock time
    deadline: float  # filled by add: clock time, infinite where the user set none
    tag: float  # filled by add: virtual start time, see Scheduler
    fresh: deque[int]  # choices that have not started yet
    preempted: list[Sequence] = field(default_factory=list)  # that gave their pages up, first choice first
    running: int = 0  # sequences that have pages
    read: bool = False  # whether the prompt's keys and values were there once: the other choices wait for it

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def startable(self) -> int:
        """Sequences that may start now: one alone until the prompt has been read, then all."""
        untouched = bool(self.fresh) and self.fresh[0] == 0
        return len(self.preempted) + (len(self.fresh) if self.read else untouched)

    @property
    def waiting(self) -> int:
        """Choices that do not run."""
        return len(self.fresh) + len(self.preempted)

    @property
    def done(self) -> bool:
        """Whether all choices have finished."""
        return not (self.fresh or self.preempted or self.running)


@dataclass(frozen=True)
class Slot:
    """One sequence's share of a planned step."""

    sequence: Sequence
    count: int  # tokens that the model reads
    logits: int  # of how many of the last ones its logits are wanted

    @property
    def ids(self) -> Items[int]:
        """The tokens."""
        start = self.sequence.computed
        return self.sequence.tokens[start : start + self.count]

    @property
    def completes(self) -> bool:
        """Whether a new token follows."""
        return self.count == self.sequence.remaining
