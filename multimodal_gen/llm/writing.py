"""One request of text while it is being answered: what has come, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from multimodal_gen.llm.detokenizer import AnswerText, DetokenizeRow, Piece
from multimodal_gen.llm.sampling import SamplingRow, TokenMatcher
from multimodal_gen.llm.sequence import Sequence
from multimodal_gen.messages import TextDelta
from multimodal_gen.text import FinishReason, TextRequest, TextTimings, TextUsage, TokenLogprob


@dataclass
class Choice:
    """One answer beside its sequence."""

    row: SamplingRow
    text: AnswerText


@dataclass
class Writing:
    """One request inside the core."""

    request: TextRequest
    end_ids: tuple[int, ...]  # tokens that end an answer
    let_go: Callable[[], None]  # of its adapter
    begin: Callable[[], TokenMatcher] | None = None  # the grammar of each answer
    # Times are measured; nothing is decided by them.
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None  # its first step
    first: float | None = None  # its first token
    choices: dict[int, Choice] = field(default_factory=dict)  # by index; made by `choice`
    cached: int = 0  # tokens of the prompt that were in the prefix cache
    completion_tokens: int = 0
    echo: list[TokenLogprob] = field(default_factory=list)  # of the prompt's tokens so far

    def choice(self, index: int) -> Choice:
        """One of its answers; they are made when they are asked for."""
        if index not in self.choices:
            asked = self.request
            text = AnswerText(
                asked.prompt,
                asked.skip_special_tokens,
                asked.spaces_between_special_tokens,
                asked.stop,
                asked.include_stop,
            )
            matcher = None if self.begin is None else self.begin()
            self.choices[index] = Choice(SamplingRow.of(asked, index, self.end_ids, matcher), text)
        return self.choices[index]

    def note_token(self) -> None:
        """One of its answers has one more token."""
        self.first = self.first or time.monotonic()
        self.completion_tokens += 1

    def usage(self) -> TextUsage:
        """So far."""
        return TextUsage(len(self.request.prompt), self.cached, self.completion_tokens)

    def timings(self) -> TextTimings:
        """At the end."""
        now = time.monotonic()
        started = now if self.started is None else self.started
        first = now if self.first is None else self.first
        return TextTimings(started - self.arrived, first - started, now - first, now - self.arrived)


@dataclass
class Written:
    """One more token of one answer."""

    writing: Writing
    sequence: Sequence
    choice: Choice
    token: int
    thought: TokenLogprob | None

    @property
    def ends(self) -> bool:
        """Whether this token says that the answer is complete."""
        matcher = self.choice.row.matcher
        return self.token in self.writing.end_ids or (matcher is not None and matcher.finished)

    @property
    def is_last(self) -> bool:
        """Whether nothing can follow, whatever the text says."""
        return self.ends or self.sequence.still == 0

    def to_decode(self) -> DetokenizeRow:
        """For the detokenizer; the end token is no text, unless the request wants it."""
        request = self.writing.request
        shown = not self.ends or request.include_stop
        watch = self.sequence.generated >= request.min_tokens
        return DetokenizeRow(self.choice.text, [self.token] if shown else [], self.is_last, watch)

    def delta(self, piece: Piece) -> TextDelta:
        """What the front is told."""
        request = self.writing.request
        finish: FinishReason | None = None
        reason: str | int | None = None
        if piece.stop is not None:
            finish, reason = "stop", piece.stop
        elif self.ends:
            finish, reason = "stop", self.token if self.token in request.stop_token_ids else None
        elif self.is_last:
            finish = "length"
        thoughts = () if self.thought is None else (self.thought,)
        return TextDelta(request.id, self.sequence.index, piece.text, (self.token,), thoughts, finish, reason)


def end_ids(request: TextRequest, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that end the request's answers."""
    return (*(() if request.ignore_eos else eos_ids), *request.stop_token_ids)
