"""From token ids to text while an answer is written: whole characters, stop texts, many answers in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

# A character is four bytes at most, so it is complete after four tokens; what is no character after so many is told as
# the decoder shows it (U+FFFD).
MAX_PENDING = 8
# Tokens of the prompt that the decoder sees before the answer: with some tokenizers a text's first space goes away.
CONTEXT = 5


class Decoder(Protocol):
    """What the detokenizer needs of a `Tokenizer`."""

    def decode_batch(
        self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> list[str]:
        """One text for each sequence."""


@dataclass(slots=True)
class AnswerText:
    """The text of one answer so far; made once by the engine core, kept by `Detokenizer.step`."""

    prompt: Sequence[int] = ()  # its end is context of the first token
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    ids: list[int] = field(default_factory=list, init=False)  # CONTEXT of the prompt, then of the answer
    start: int = field(default=0, init=False)  # of the window that is decoded
    told: int = field(default=0, init=False)  # ids whose text is out; the window starts at or before it
    held: str = field(default="", init=False)  # decoded, but it may be the beginning of a stop

    def __post_init__(self) -> None:
        self.ids += self.prompt[-CONTEXT:]
        self.told = len(self.ids)


@dataclass(frozen=True, slots=True)
class DetokenizeRow:
    """What one step adds to one answer."""

    answer: AnswerText
    ids: Sequence[int]  # new tokens; without the one that ends the answer, unless it is to be seen
    last: bool = False  # nothing follows: tell all that was held back
    watch: bool = True  # False while fewer than min_tokens have come: stops do not count


@dataclass(frozen=True, slots=True)
class Piece:
    """What the answer's reader gets of a step."""

    text: str
    stop: str | None = None  # the stop text that ended the answer; nothing follows


class Detokenizer:
    """Decodes what a step has added to all answers; rows that decode alike share one call."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.groups = 0  # calls so far, for metrics
        self.rows = 0  # rows so far

    def step(self, rows: Sequence[DetokenizeRow]) -> list[Piece]:
        """The new text of each row, in the order of the rows."""
        grouped: dict[tuple[bool, bool], list[int]] = {}
        for place, row in enumerate(rows):
            row.answer.ids.extend(row.ids)
            alike = (row.answer.skip_special_tokens, row.answer.spaces_between_special_tokens)
            grouped.setdefault(alike, []).append(place)
        texts = [""] * len(rows)
        for (skip, spaces), places in grouped.items():
            for place, text in zip(places, self._decode([rows[at] for at in places], skip, spaces), strict=True):
                texts[place] = text
        self.groups += len(grouped)
        self.rows += len(rows)
        return [_cut(row, text) for row, text in zip(rows, texts, strict=True)]

    def _decode(self, rows: list[DetokenizeRow], skip: bool, spaces: bool) -> list[str]:
        windows = [row.answer.ids[row.answer.start : row.answer.told] for row in rows]
        windows += [row.answer.ids[row.answer.start :] for row in rows]
        texts = self._decoder.decode_batch(windows, skip_special_tokens=skip, spaces_between_special_tokens=spaces)
        assert len(texts) == len(windows), f"{len(windows)} sequences were decoded to {len(texts)} texts"
        return [
            _new_text(row, old, new) for row, old, new in zip(rows, texts[: len(rows)], texts[len(rows) :], strict=True)
        ]


def _new_text(row: DetokenizeRow, old: str, new: str) -> str:
    """What the window says beyond what is out, once it ends with a whole character."""
    answer = row.answer
    unfinished = new.endswith("\ufffd") or len(new) <= len(old)
    if unfinished and not row.last and len(answer.ids) - answer.told <= MAX_PENDING:
        return ""
    answer.start, answer.told = answer.told, len(answer.ids)
    return new[len(old) :]


def _cut(row: DetokenizeRow, text: str) -> Piece:
    """Look for stops in what is not out yet, and hold back what may become one."""
    answer = row.answer
    if not answer.stops or not row.watch:
        text, answer.held = answer.held + text, ""
        return Piece(text)
    text = answer.held + text
    found = [(at, stop) for stop in answer.stops if (at := text.find(stop)) >= 0]
    if found:
        at, stop = min(found, key=lambda pair: pair[0])
        answer.held = ""
        return Piece(text[: at + len(stop)] if answer.include_stop else text[:at], stop)
    keep = 0 if row.last else max(_overlap(text, stop) for stop in answer.stops)
    answer.held = text[len(text) - keep :]
    return Piece(text[: len(text) - keep])


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that a stop begins with, short of all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
