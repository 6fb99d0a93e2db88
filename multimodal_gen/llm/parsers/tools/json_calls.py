"""Calls as JSON objects: inside of tags (Hermes, Qwen), bare (Llama), or in a list (calls that a grammar wrote)."""

from __future__ import annotations

from collections.abc import Sequence

from multimodal_gen.llm.parsers.pieces import cut
from multimodal_gen.llm.parsers.tools.base import Tool, ToolParser
from multimodal_gen.llm.parsers.tools.call_object import CallObject

_BETWEEN = " \t\r\n,;[]"
"""what may stand between two calls"""


class JsonCalls(ToolParser):
    """Subclasses name the marks."""

    opener = ""
    """text that calls come after, anywhere in the answer"""
    closer = ""
    """text that ends them; "": the first thing that is no call"""
    bare = ""
    """characters that begin a call at the very start of an answer, without an opener"""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools)
        self._in_calls = False
        self._fresh = True  # nothing but white space so far
        self._raw = ""  # since the opener, until a call of ours is sure
        self._sure = False  # there has been one since the opener
        self._object: CallObject | None = None
        self._known = False  # the object calls a tool of ours

    def _step(self) -> bool:
        if self._object is not None:
            return self._read_object()
        return self._between_calls() if self._in_calls else self._in_text()

    def _end(self) -> None:
        if self._in_calls and self._sure and self._object is None:
            self._buffer = ""  # half a closer
        elif not self._known:
            self._buffer = self._raw + (self._object.raw if self._object else "") + self._buffer
            self._raw = ""

    def _in_text(self) -> bool:
        start = self._buffer.lstrip()
        if self._fresh and self.bare:
            if not start:
                return False
            if start[0] in self.bare:
                self._raw = self._buffer[: len(self._buffer) - len(start)]
                self._buffer, self._in_calls, self._fresh, self._sure = start, True, False, False
                return True
        self._fresh = False
        before, opener, self._buffer = cut(self._buffer, (self.opener,)) if self.opener else (self._buffer, None, "")
        self._tell(before)
        if opener is None:
            return False
        self._raw, self._in_calls, self._sure = opener, True, False
        return True

    def _between_calls(self) -> bool:
        rest = self._buffer.lstrip(_BETWEEN)
        if not self._sure:
            self._raw += self._buffer[: len(self._buffer) - len(rest)]
        self._buffer = rest
        if rest.startswith("{"):
            self._object = CallObject()
            return True
        if self._sure and self.closer:
            _, mark, self._buffer = cut(rest, (self.closer, "{"))
            if mark == "{":  # a call that the closer before it is missing from
                self._buffer = mark + self._buffer
            else:
                self._in_calls = mark is None
            return mark is not None
        if not rest:
            return False
        self._back_to_text()
        return True

    def _read_object(self) -> bool:
        call = self._object
        assert call is not None
        self._buffer = call.feed(self._buffer)
        if not self._known and call.name is not None and not call.broken:
            if call.name in self.tools:
                self._known, self._sure, self._raw = True, True, ""
                self._start(call.name)
            else:
                self._back_to_text()
                return True
        if call.broken and not self._known:
            self._back_to_text()
            return True
        if self._known:
            self._arguments(call.take())
        if call.done or call.broken:
            self._object, self._known = None, False
        return bool(self._buffer)

    def _back_to_text(self) -> None:
        """No call of ours: it is told as it was written, up to where the next one could begin."""
        written = self._raw + (self._object.raw if self._object else "")
        self._raw, self._object, self._in_calls = "", None, False
        self._tell(written)


class HermesCalls(JsonCalls):
    """`<tool_call>{"name": "f", "arguments": {}}</tool_call>`: Hermes, Qwen2.5, Qwen3."""

    opener, closer = "<tool_call>", "</tool_call>"


class LlamaCalls(JsonCalls):
    """`{"name": "f", "parameters": {}}; {…}`, maybe after `<|python_tag|>`: Llama 3."""

    opener, bare = "<|python_tag|>", "{"


class ListedCalls(JsonCalls):
    """`[{"name": "f", "arguments": {}}, …]`: what a grammar forces where it cannot force the model's own way."""

    bare = "["
