"""`[f(city="Paris", days=3), g()]`: Llama 4 and Llama 3.2, calls as Python writes them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from multimodal_gen.llm.parsers.tools.base import Tool, ToolParser
from multimodal_gen.llm.parsers.types import dumped

START, STOP = "<|python_start|>", "<|python_end|>"
MAX_CALL_CHARS = 1 << 16
MAX_NESTING = 64

_NAME = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*\(")
_MAYBE_NAME = re.compile(r"\s*([A-Za-z_][\w.-]*\s*)?")


class _Brackets:
    """Looks for the bracket that ends a call, no character twice."""

    def __init__(self, at: int) -> None:
        self._at = at  # of the next character
        self._opened = 1
        self._quote = ""
        self._escaped = False

    def end(self, text: str) -> int:
        """Where the call has ended; 0: not yet; -1: it is none of ours."""
        while self._at < min(len(text), MAX_CALL_CHARS):
            self._look(text[self._at])
            self._at += 1
            if not self._opened:
                return self._at
            if self._opened > MAX_NESTING:
                return -1
        return 0 if len(text) < MAX_CALL_CHARS else -1

    def _look(self, char: str) -> None:
        if self._quote:
            if self._escaped or char == "\\":
                self._escaped = not self._escaped
            elif char == self._quote:
                self._quote = ""
        elif char in "'\"":
            self._quote = char
        elif char in "([{":
            self._opened += 1
        elif char in ")]}":
            self._opened -= 1


class PythonicCalls(ToolParser):
    """Calls are told one by one, each when it is complete. They are read as literals and never evaluated."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools)
        self._state: Literal["start", "calls", "text"] = "start"
        self._raw = ""  # of the list, until its first call is sure
        self._brackets: _Brackets | None = None  # of the call that is being read

    def _step(self) -> bool:
        if self._state == "start":
            return self._begin()
        if self._state == "calls":
            return self._read_call()
        text, self._buffer = self._buffer, ""
        self._tell(text)
        return False

    def _end(self) -> None:
        if self._state == "calls" and not self.calls:
            self._buffer, self._raw = self._raw + self._buffer, ""
        elif self._state == "calls":
            self._buffer = ""  # half a call

    def _begin(self) -> bool:
        start = self._buffer.lstrip()
        if START.startswith(start):  # or nothing yet
            return False
        start = start.removeprefix(START).lstrip()
        if start[:1] not in ("", "["):
            self._state = "text"
        elif start:
            at = len(self._buffer) - len(start) + 1
            self._raw, self._buffer, self._state = self._buffer[:at], self._buffer[at:], "calls"
        return self._state != "start"

    def _read_call(self) -> bool:
        if self.calls and self._brackets is None:
            self._buffer = self._buffer.lstrip(", \t\r\n")
            if self._buffer.startswith("]"):
                return self._close()
        name = _NAME.match(self._buffer)
        if name is None:
            if _MAYBE_NAME.fullmatch(self._buffer):
                return False
            return self._give_up()
        self._brackets = self._brackets or _Brackets(name.end())
        end = self._brackets.end(self._buffer)
        if end == 0:
            return False
        self._brackets = None
        values = _arguments_of(self._buffer[:end], self.tools[name[1]]) if end > 0 and name[1] in self.tools else None
        if values is None:
            return self._give_up()
        self._start(name[1])
        self._arguments(dumped(values))
        self._buffer, self._raw = self._buffer[end:], ""
        return True

    def _close(self) -> bool:
        rest = self._buffer[1:].lstrip()
        if STOP.startswith(rest):  # or nothing yet
            return False
        self._buffer, self._state = rest.removeprefix(STOP), "text"
        return True

    def _give_up(self) -> bool:
        """No call of ours: the rest is text, as it was written."""
        self._buffer, self._raw, self._state = self._raw + self._buffer, "", "text"
        return True


def _arguments_of(call: str, tool: Tool) -> dict[str, Any] | None:
    """The arguments of a call by name; None where they are no literals. Those without a name follow the schema."""
    opening = call.index("(")
    try:
        node = ast.parse("f" + call[opening:], mode="eval").body
        if not isinstance(node, ast.Call):
            return None
        properties = tool.parameters.get("properties")
        names = list(properties) if isinstance(properties, dict) else []
        if len(node.args) > len(names):
            return None
        values = dict(zip(names, map(_literal, node.args), strict=False))
        for keyword in node.keywords:
            if keyword.arg is None:
                return None
            values[keyword.arg] = _literal(keyword.value)
        json.dumps(values, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return values


_WORDS = {"true": True, "false": False, "null": None}


class _JsonWords(ast.NodeTransformer):
    """JSON's names of constants count as Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node


def _literal(node: ast.expr) -> Any:
    return ast.literal_eval(_JsonWords().visit(node))
