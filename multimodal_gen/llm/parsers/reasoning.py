"""Reasoning apart from the answer: `<think>…</think>` and what models leave out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from multimodal_gen.errors import ConfigError, did_you_mean
from multimodal_gen.llm.parsers.pieces import Piece, Reasoning, Spaces, Text, cut, may_become


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model marks its reasoning."""

    opener: str = "<think>"
    closer: str = "</think>"
    always: bool = False  # it reasons whether it writes the opener or not, unless the prompt has closed it already

    def begins_inside(self, prompt: str) -> bool:
        """Whether the answer to this rendered prompt starts in the middle of the reasoning."""
        return prompt.rstrip().endswith(self.opener) or (self.always and not self.is_over(prompt))

    def is_over(self, prompt: str) -> bool:
        """Whether this prompt has ended the reasoning already, as templates do where it is switched off."""
        return prompt.rstrip().endswith(self.closer)


FORMATS: dict[str, ReasoningFormat] = {
    "deepseek_r1": ReasoningFormat(always=True),
    "qwen3": ReasoningFormat(),
    "think": ReasoningFormat(),
    "nemotron_nano_v3": ReasoningFormat(),
}
# Looked for in a chat template, in order; the first that it has names the format.
_SIGNS = (("<｜Assistant｜>", "deepseek_r1"), ("enable_thinking", "qwen3"), ("<think>", "think"))


def reasoning_format(name: str, template: str | None) -> ReasoningFormat | None:
    """The format of that name; `auto` looks at the model's chat template. None: the model marks none.

    Raises: ConfigError.
    """
    if name == "auto":
        found = next((row for sign, row in _SIGNS if template and "<think>" in template and sign in template), "none")
        return FORMATS.get(found)
    if name == "none":
        return None
    if name not in FORMATS:
        raise ConfigError(
            f"There is no reasoning parser {name!a}.{did_you_mean(name, FORMATS)} There are: auto, none, "
            f"{', '.join(FORMATS)}.",
            param="reasoning_parser",
        )
    return FORMATS[name]


class ReasoningParser:
    """One answer: what is inside the marks is `Reasoning`, the rest is `Text`.

    White space around both is left out; `raw` leaves everything in, marks as well.
    """

    def __init__(self, form: ReasoningFormat, *, inside: bool, raw: bool = False) -> None:
        self._form = form
        self._raw = raw
        self._state: Literal["start", "inside", "outside"] = "start"
        self._inside_from_start = inside
        self._buffer = ""
        self._spaces = Spaces(started=raw)
        self._skip = False  # white space between the reasoning and the answer

    def feed(self, text: str) -> list[Piece]:
        """What the next part of the answer comes to."""
        self._buffer += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._begin(pieces)
        if self._state == "inside":
            self._think(pieces)
        if self._state == "outside":
            self._answer(pieces)
        return pieces

    def finish(self) -> list[Piece]:
        """The rest, once the answer has ended."""
        pieces: list[Piece] = []
        rest, self._buffer = self._buffer, ""
        if self._state == "inside" or (self._state == "start" and self._inside_from_start):
            self._reasoning(rest, pieces)  # white space that is still held only trails
        elif rest:
            pieces.append(Text(rest))
        return pieces

    def _begin(self, pieces: list[Piece]) -> None:
        """An opener is looked for even where the prompt ended with one: some models write it again."""
        opener, start = self._form.opener, self._buffer.lstrip()
        if start.startswith(opener):
            if self._raw:
                pieces.append(Reasoning(self._buffer[: len(self._buffer) - len(start)] + opener))
            self._buffer, self._state = start[len(opener) :], "inside"
        elif not may_become(start, (opener,)):
            self._state = "inside" if self._inside_from_start else "outside"

    def _think(self, pieces: list[Piece]) -> None:
        before, closer, self._buffer = cut(self._buffer, (self._form.closer,))
        self._reasoning(before, pieces)
        if closer is None:
            return
        self._state = "outside"
        if self._raw:
            pieces.append(Reasoning(closer))
        else:
            self._skip = True

    def _answer(self, pieces: list[Piece]) -> None:
        text, self._buffer = self._buffer, ""
        if self._skip:
            text = text.lstrip()
            self._skip = not text
        if text:
            pieces.append(Text(text))

    def _reasoning(self, text: str, pieces: list[Piece]) -> None:
        told = text if self._raw else self._spaces.pass_on(text)
        if told:
            pieces.append(Reasoning(told))


def after_reasoning(form: ReasoningFormat, rule: dict[str, Any], *, inside: bool) -> dict[str, Any]:
    """The part of a structural tag for an answer that thinks freely before it obeys `rule`."""
    thoughts = {
        "type": "tag",
        "begin": "" if inside else form.opener,
        "content": {"type": "any_text"},
        "end": form.closer,
    }
    spaces = {"type": "regex", "pattern": r"\n{0,2}"}
    first = {"type": "sequence", "elements": [thoughts, spaces]}
    return {
        "type": "sequence",
        "elements": [first if inside else {"type": "optional", "content": first}, rule],
    }
