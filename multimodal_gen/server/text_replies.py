"""Answers of a language model in OpenAI's shapes: what whole answers and streams have in common, and whole answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from multimodal_gen.llm.parsers.answer import AnswerParser
from multimodal_gen.llm.parsers.pieces import CallArguments, CallStart, Piece, Reasoning
from multimodal_gen.llm.tokenizer import Tokenizer
from multimodal_gen.messages import TextFinished
from multimodal_gen.text import FinishReason, TextOutput, TextTimings, TextUsage, TokenLogprob

LEAST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI says this instead"""

Kind = Literal["chat.completion", "chat.completion.chunk", "text_completion"]


@dataclass(frozen=True)
class Heading:
    """What every answer, and every chunk of a stream, begins with."""

    id: str
    model: str  # the name that the client knows
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds

    def of(self, kind: Kind) -> dict[str, Any]:
        """As JSON."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True)
class ChatForm:
    """How one chat wants its answers read and told."""

    heading: Heading
    tokenizer: Tokenizer
    parser: Callable[[], AnswerParser]  # a new one for each answer
    logprobs: bool = False
    usage_chunk: bool = False  # of a stream
    warnings: tuple[str, ...] = ()


@dataclass
class Told:
    """What pieces of one answer come to, as the fields of a message or of a chunk's delta."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)  # by their index

    def add(self, pieces: Iterable[Piece]) -> None:
        """Take pieces in."""
        for piece in pieces:
            if isinstance(piece, CallStart):
                function = {"name": piece.name, "arguments": ""}
                self.calls[piece.index] = {
                    "id": "call_" + uuid.uuid4().hex[:24],
                    "type": "function",
                    "function": function,
                }
            elif isinstance(piece, CallArguments):
                call = self.calls.setdefault(piece.index, {"function": {"arguments": ""}})
                call["function"]["arguments"] += piece.text
            elif isinstance(piece, Reasoning):
                self.reasoning.append(piece.text)
            else:
                self.content.append(piece.text)

    def delta(self) -> dict[str, Any]:
        """The fields of a chunk, and a new start."""
        fields: dict[str, Any] = {}
        if self.reasoning:
            fields["reasoning_content"] = "".join(self.reasoning)
        if self.content:
            fields["content"] = "".join(self.content)
        if self.calls:
            fields["tool_calls"] = [{"index": index, **call} for index, call in self.calls.items()]
        self.content, self.reasoning, self.calls = [], [], {}
        return fields

    def message(self) -> dict[str, Any]:
        """The whole message."""
        content = "".join(self.content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.calls and not content else content,
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = list(self.calls.values())
        return message


def finish_reason(reason: FinishReason, calls: int) -> str:
    """In OpenAI's words."""
    return "tool_calls" if calls and reason == "stop" else reason


def chat_body(form: ChatForm, outputs: Sequence[TextOutput], finished: TextFinished) -> bytes:
    """The body of a whole chat answer."""
    body = {
        **form.heading.of("chat.completion"),
        "choices": [_chat_choice(form, index, output) for index, output in enumerate(outputs)],
        **closing(finished.usage, finished.timings, form.warnings),
    }
    return msgspec.json.encode(body)


def _chat_choice(form: ChatForm, index: int, output: TextOutput) -> dict[str, Any]:
    parser, told = form.parser(), Told()
    told.add(parser.feed(output.text))
    told.add(parser.finish())
    logprobs = spoken(output.logprobs or (), output.finish_reason, output.stop_reason, form.tokenizer)
    choice: dict[str, Any] = {
        "index": index,
        "message": told.message(),
        "logprobs": {"content": chat_logprobs(logprobs, form.tokenizer)} if form.logprobs else None,
        "finish_reason": finish_reason(output.finish_reason, parser.calls),
    }
    if output.stop_reason is not None:
        choice["stop_reason"] = output.stop_reason
    return choice


def closing(usage: TextUsage, timings: TextTimings, warnings: Sequence[str]) -> dict[str, Any]:
    """What whole answers end with."""
    end: dict[str, Any] = {"usage": usage_view(usage), "timings": msgspec.to_builtins(timings)}
    return {**end, "warnings": list(warnings)} if warnings else end


def usage_view(usage: TextUsage) -> dict[str, Any]:
    """Tokens, in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def spoken(
    logprobs: Sequence[TokenLogprob], finish: FinishReason | None, stop_reason: str | int | None, tokenizer: Tokenizer
) -> Sequence[TokenLogprob]:
    """Without the token that only ended the answer: its text is no part of it."""
    if finish != "stop" or not logprobs:
        return logprobs
    last = logprobs[-1].token_id
    return logprobs[:-1] if last == stop_reason or (stop_reason is None and last in tokenizer.eos_ids) else logprobs


def chat_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One entry for each token of an answer."""
    return [
        {
            **_entry(token.token_id, token.logprob, tokenizer),
            "top_logprobs": [_entry(candidate, logprob, tokenizer) for candidate, logprob in token.top],
        }
        for token in logprobs
    ]


def _entry(token_id: int, logprob: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(token_id)
    return {
        "token": spelled.decode("utf-8", "replace"),
        "logprob": finite(logprob),
        "bytes": list(spelled),
    }


def finite(logprob: float | None) -> float | None:
    """A log-probability that JSON can say."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def data_bytes(data: object) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
