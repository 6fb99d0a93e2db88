"""What parsers make of a model's text, and how they find markers in text that is still arriving.

A parser is fed the answer in pieces of any size, and says what it has understood so far. However the text is cut, the
pieces of one kind join to the same whole (tests/unit/test_parsers.py tries every cut).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Part of the answer itself."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Part of what the model thought before it answered."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """The model calls a tool; `index` counts the calls of one answer from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """Part of the JSON text of a call's arguments."""

    index: int
    text: str


Piece = Text | Reasoning | CallStart | CallArguments


def cut(text: str, markers: Sequence[str]) -> tuple[str, str | None, str]:
    """(what stands before the first marker, that marker, what stands after it).

    Where there is none: (what can be no part of one, None, an end that may be the beginning of one).
    """
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    if found:
        at, marker = min(found, key=lambda hit: hit[0])
        return text[:at], marker, text[at + len(marker) :]
    for at in range(max(0, len(text) - max(map(len, markers)) + 1), len(text)):
        if any(marker.startswith(text[at:]) for marker in markers):
            return text[:at], None, text[at:]
    return text, None, ""


def may_become(text: str, markers: Sequence[str]) -> bool:
    """Whether `text` is the beginning of a marker, or nothing yet."""
    return any(marker.startswith(text) for marker in markers)


class Spaces:
    """Holds white space back until it is known whether something follows it."""

    def __init__(self, *, started: bool = True) -> None:
        self._held = ""
        self._started = started  # False: white space at the beginning is dropped

    def pass_on(self, text: str) -> str:
        """What may be told now."""
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        kept = text.rstrip()
        if not kept:
            self._held += text
            return ""
        told, self._held = self._held + kept, text[len(kept) :]
        return told

    def drop(self) -> None:
        """What is held is of no use, nor is what comes next."""
        self._held, self._started = "", False

    def release(self) -> str:
        """What is held, at the end."""
        told, self._held = self._held, ""
        return told
