"""What all formats of tool calls have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from multimodal_gen.llm.parsers.pieces import CallArguments, CallStart, Piece, Spaces, Text


@dataclass(frozen=True)
class Tool:
    """A function that the model may call, as the client describes it."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})  # JSON schema
    strict: bool = False  # its arguments must match the schema

    def listed(self) -> dict[str, Any]:
        """OpenAI's shape, which chat templates expect."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class ToolParser(ABC):
    """Reads the calls of one answer. What calls no known tool stays text, exactly as it was written."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.calls = 0
        self._buffer = ""
        self._pieces: list[Piece] = []
        self._spaces = Spaces()

    def feed(self, text: str) -> list[Piece]:
        """What the next part of the answer comes to."""
        self._buffer += text
        while self._buffer and self._step():
            pass
        return self._taken()

    def finish(self) -> list[Piece]:
        """The rest, once the answer has ended. A call that is cut off stays as far as it came."""
        self._end()
        self._tell(self._buffer)
        self._buffer = ""
        rest = self._spaces.release()
        if rest and not self.calls:
            self._pieces.append(Text(rest))
        return self._taken()

    @abstractmethod
    def _step(self) -> bool:
        """Read on in `_buffer`; whether more can be understood without new text."""

    @abstractmethod
    def _end(self) -> None:
        """Give back to `_buffer` what turned out to be no call."""

    def _tell(self, text: str) -> None:
        """Text of the answer; white space before and after calls is left out."""
        told = self._spaces.pass_on(text)
        if told:
            self._pieces.append(Text(told))

    def _start(self, name: str) -> None:
        self._pieces.append(CallStart(self.calls, name))
        self.calls += 1
        self._spaces.drop()

    def _arguments(self, text: str) -> None:
        if text:
            self._pieces.append(CallArguments(self.calls - 1, text))

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces
