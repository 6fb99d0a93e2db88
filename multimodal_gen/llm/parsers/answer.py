"""One answer as its client wants to read it: reasoning first, then text and tool calls."""

from __future__ import annotations

from multimodal_gen.llm.parsers.pieces import CallArguments, CallStart, Piece, Reasoning, Text
from multimodal_gen.llm.parsers.reasoning import ReasoningParser
from multimodal_gen.llm.parsers.tools.base import ToolParser


class AnswerParser:
    """Puts the parsers in a row. Without any, all is text.

    `separate`: reasoning comes as `Reasoning`, else as `Text` with its marks (its parser must be a raw one). `stream`:
    it comes as it is written, else all at once. `parallel`: all calls are told, else the first alone.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None = None,
        tools: ToolParser | None = None,
        *,
        separate: bool = True,
        stream: bool = True,
        parallel: bool = True,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._separate = separate
        self._stream = stream
        self._parallel = parallel
        self._held: list[str] = []  # reasoning that comes all at once

    @property
    def calls(self) -> int:
        """Tool calls so far."""
        calls = self._tools.calls if self._tools is not None else 0
        return calls if self._parallel else min(calls, 1)

    def feed(self, text: str) -> list[Piece]:
        """What the next part of the answer comes to."""
        pieces: list[Piece] = [Text(text)] if self._reasoning is None else self._reasoning.feed(text)
        return self._sorted(pieces)

    def finish(self) -> list[Piece]:
        """The rest, once the answer has ended."""
        pieces = self._sorted([] if self._reasoning is None else self._reasoning.finish())
        pieces += self._released()
        if self._tools is not None:
            pieces += self._told(self._tools.finish())
        return pieces

    def _sorted(self, pieces: list[Piece]) -> list[Piece]:
        done: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Reasoning):
                if not self._stream:
                    self._held.append(piece.text)
                else:
                    done.append(piece if self._separate else Text(piece.text))
                continue
            assert isinstance(piece, Text), piece
            done += self._released()
            if piece.text:
                done += [piece] if self._tools is None else self._told(self._tools.feed(piece.text))
        return done

    def _told(self, pieces: list[Piece]) -> list[Piece]:
        if self._parallel:
            return pieces
        return [piece for piece in pieces if not isinstance(piece, (CallStart, CallArguments)) or piece.index == 0]

    def _released(self) -> list[Piece]:
        text, self._held = "".join(self._held), []
        if not text:
            return []
        return [Reasoning(text) if self._separate else Text(text)]
