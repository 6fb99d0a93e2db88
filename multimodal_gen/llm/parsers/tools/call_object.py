"""`{"name": "…", "arguments": {…}}`, read as it arrives."""

from __future__ import annotations

import json
from typing import Literal

from multimodal_gen.llm.parsers.types import escaped

ARGUMENTS = ("arguments", "parameters")

_State = Literal["open", "key", "colon", "value", "string", "nested", "scalar", "next", "done", "broken"]
_SPACE = " \t\r\n"


class CallObject:
    """One call. Its arguments are handed on as they are written, once the name is known."""

    def __init__(self) -> None:
        self.raw = ""  # as written so far
        self.name: str | None = None
        self._state: _State = "open"
        self._at = 0  # of the next character of `raw` to look at
        self._key = ""
        self._in_key = False  # the string that is being read is a key
        self._begin = 0  # of the value that is being read
        self._depth = 0
        self._quoted = False  # inside of a string
        self._escaped = False  # after a backslash
        self._span: tuple[int, int] | None = None  # of the arguments, as far as they are known
        self._decoded: str | None = None  # arguments that came as JSON in a string
        self._told = 0

    @property
    def done(self) -> bool:
        """Whether the object is complete."""
        return self._state == "done"

    @property
    def broken(self) -> bool:
        """Whether this is no such object: it is not JSON, or has no name."""
        return self._state == "broken"

    def feed(self, text: str) -> str:
        """Read on; returns what stands behind the object's end, or behind what broke it."""
        self.raw += text
        while self._at < len(self.raw) and not (self.done or self.broken):
            self._look(self.raw[self._at])
        if self.done and self.name is None:
            self._state = "broken"
        if not (self.done or self.broken):
            return ""
        rest, self.raw = self.raw[self._at :], self.raw[: self._at]
        return rest

    def take(self) -> str:
        """The arguments that are new since the last time; only once `name` is known."""
        if self._decoded is not None:
            known = self._decoded
        elif self._span is not None:
            known = self.raw[self._span[0] : self._span[1]]
        else:
            known = "{}" if self.done else ""
        new, self._told = known[self._told :], len(known)
        return new

    def _look(self, char: str) -> None:
        state = self._state
        if state == "string":
            self._in_string(char)
        elif state == "nested":
            self._in_nested(char)
        elif state == "scalar":
            self._in_scalar(char)
        elif char not in _SPACE:
            self._between(state, char)
        else:
            self._at += 1

    def _between(self, state: _State, char: str) -> None:
        """Outside of keys and values."""
        self._at += 1
        if state == "open":
            self._state = "key" if char == "{" else "broken"
        elif state == "key" and char == '"':
            self._in_key = True
            self._begin, self._state = self._at - 1, "string"
        elif state == "colon" and char == ":":
            self._state = "value"
        elif state == "value" and char in '{["':
            self._begin_value("string" if char == '"' else "nested")
            self._depth = 1
        elif state == "value" and char not in ",}]:":
            self._begin_value("scalar")
        elif state == "next" and char == ",":
            self._state = "key"
        else:
            self._state = "done" if char == "}" and state in ("key", "next") else "broken"

    def _begin_value(self, kind: Literal["string", "nested", "scalar"]) -> None:
        self._in_key = False
        self._begin, self._state = self._at - 1, kind
        if kind == "nested" and self._is_arguments():
            self._span = (self._begin, self._at)

    def _is_arguments(self) -> bool:
        return self._key in ARGUMENTS and self._span is None and self._decoded is None

    def _in_string(self, char: str) -> None:
        self._at += 1
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._end_value()

    def _in_nested(self, char: str) -> None:
        self._at += 1
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._quoted = False
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if self._span is not None and self._begin == self._span[0]:
            self._span = (self._begin, self._at)
        if not self._depth:
            self._state = "next"

    def _in_scalar(self, char: str) -> None:
        if char in ",}" or char in _SPACE:
            self._state = "next"
        else:
            self._at += 1

    def _end_value(self) -> None:
        """A string is complete: a key, the name, or arguments that somebody has dumped twice."""
        try:
            text = json.loads(self.raw[self._begin : self._at], strict=False)
        except ValueError:
            self._state = "broken"
            return
        if self._in_key:
            self._key, self._state = text, "colon"
            return
        self._state = "next"
        if self._key == "name" and self.name is None:
            self.name = text
        elif self._is_arguments():
            # Inside of JSON, a half of a surrogate pair can only be meant as one that is escaped.
            self._decoded = escaped(text)
