"""GLM-4.7: `<tool_call>f<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>`.

Values are bare text, so the tool's schema decides what they are. Text arguments are told as they arrive, others when
they are complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from multimodal_gen.llm.parsers.pieces import cut
from multimodal_gen.llm.parsers.tools.base import Tool, ToolParser
from multimodal_gen.llm.parsers.types import ALL, dumped, types_of, value_of

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"

_State = Literal["text", "name", "between", "key", "before value", "value", "string"]


class GlmCalls(ToolParser):
    """The state machine of one answer."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools)
        self._state: _State = "text"
        self._name = ""
        self._key = ""
        self._keys = 0  # of this call
        self._types: dict[tuple[str, str], frozenset[str]] = {}

    def _step(self) -> bool:
        steps = {
            "text": self._in_text, "name": self._in_name, "between": self._in_between, "key": self._in_key,
            "before value": self._before_value, "value": self._in_value, "string": self._in_string,
        }  # fmt: skip
        return steps[self._state]()

    def _end(self) -> None:
        if self._state == "name":
            self._buffer = OPEN + self._buffer
        elif self._state == "string":
            self._arguments(dumped(self._buffer)[1:-1])
            self._buffer = ""
        elif self._state != "text":
            self._buffer = ""

    def _in_text(self) -> bool:
        before, opener, self._buffer = cut(self._buffer, (OPEN,))
        self._tell(before)
        if opener is not None:
            self._state = "name"
        return opener is not None

    def _in_name(self) -> bool:
        before, mark, rest = cut(self._buffer, (KEY, CLOSE))
        if mark is None:
            return False
        self._name, self._keys = before.strip(), 0
        if self._name not in self.tools:
            # Told as it was written; the marks of its arguments mean nothing in text.
            self._tell(OPEN + before + mark)
            self._buffer, self._state = rest, "text"
            return True
        self._buffer = rest
        self._start(self._name)
        self._arguments("{" if mark == KEY else "{}")
        self._state = "key" if mark == KEY else "text"
        return True

    def _in_between(self) -> bool:
        _, mark, self._buffer = cut(self._buffer, (KEY, CLOSE))
        if mark == CLOSE:
            self._arguments("}")
        if mark is not None:
            self._state = "key" if mark == KEY else "text"
        return mark is not None

    def _in_key(self) -> bool:
        before, mark, rest = cut(self._buffer, (KEY_END,))
        if mark is None:
            return False
        self._key, self._buffer, self._state = before.strip(), rest, "before value"
        self._arguments((", " if self._keys else "") + dumped(self._key) + ": ")
        self._keys += 1
        return True

    def _before_value(self) -> bool:
        _, mark, self._buffer = cut(self._buffer, (VALUE,))
        if mark is None:
            return False
        self._state = "string" if self._expected() == {"string"} else "value"
        if self._state == "string":
            self._arguments('"')
        return True

    def _in_value(self) -> bool:
        before, mark, rest = cut(self._buffer, (VALUE_END,))
        if mark is None:
            return False
        self._buffer, self._state = rest, "between"
        self._arguments(dumped(value_of(before, self._expected())))
        return True

    def _in_string(self) -> bool:
        before, mark, self._buffer = cut(self._buffer, (VALUE_END,))
        self._arguments(dumped(before)[1:-1] + ('"' if mark else ""))
        if mark is not None:
            self._state = "between"
        return mark is not None

    def _expected(self) -> frozenset[str]:
        """The types of the argument whose key was read."""
        place = (self._name, self._key)
        if place not in self._types:
            schema = self.tools[self._name].parameters
            properties = schema.get("properties")
            known = properties.get(self._key) if isinstance(properties, dict) else None
            self._types[place] = ALL if known is None else types_of(known, schema)
        return self._types[place]
