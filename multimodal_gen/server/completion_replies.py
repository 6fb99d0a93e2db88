"""Answers of `POST /v1/completions`: texts that may begin with their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from multimodal_gen.llm.tokenizer import Tokenizer
from multimodal_gen.messages import TextFinished
from multimodal_gen.server.text_replies import Heading, closing, finite, spoken
from multimodal_gen.text import TextOutput, TextTimings, TextUsage, TokenLogprob


@dataclass(frozen=True)
class CompletionForm:
    """How one request wants its answers told."""

    heading: Heading
    tokenizer: Tokenizer
    n: int  # answers of each prompt
    echoes: tuple[str, ...] = ()  # the prompts, where answers begin with them
    written: bool = True  # False: the prompt alone is told, and one token was made for nothing
    logprobs: bool = False
    usage_chunk: bool = False  # of a stream
    warnings: tuple[str, ...] = ()

    def index(self, prompt: int, choice: int) -> int:
        """Among all choices of the answer."""
        return prompt * self.n + choice

    def echo(self, prompt: int) -> str:
        """What an answer to that prompt begins with."""
        return self.echoes[prompt] if self.echoes else ""


Answered = tuple[Sequence[TextOutput], TextFinished]
"""the answers to one prompt"""


def completion_body(form: CompletionForm, answers: Sequence[Answered]) -> bytes:
    """The body of a whole answer."""
    choices = [
        _choice(form, prompt, index, output, finished)
        for prompt, (outputs, finished) in enumerate(answers)
        for index, output in enumerate(outputs)
    ]
    usage, timings = total_usage([finished.usage for _, finished in answers], form), answers[-1][1].timings
    longest = max((finished.timings for _, finished in answers), key=_total, default=timings)
    body = {**form.heading.of("text_completion"), "choices": choices, **closing(usage, longest, form.warnings)}
    return msgspec.json.encode(body)


def _total(timings: TextTimings) -> float:
    return timings.total


def total_usage(usages: Sequence[TextUsage], form: CompletionForm) -> TextUsage:
    """Of all prompts together."""
    return TextUsage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages) if form.written else 0,
    )


def _choice(
    form: CompletionForm, prompt: int, index: int, output: TextOutput, finished: TextFinished
) -> dict[str, Any]:
    echo = form.echo(prompt)
    choice: dict[str, Any] = {
        "index": form.index(prompt, index),
        "text": echo + (output.text if form.written else ""),
        "logprobs": None,
        "finish_reason": output.finish_reason,
    }
    if form.logprobs:
        own = spoken(output.logprobs or (), output.finish_reason, output.stop_reason, form.tokenizer)
        told = [*finished.prompt_logprobs, *(own if form.written else ())]
        choice["logprobs"] = completion_logprobs(told, form.tokenizer)
    if output.stop_reason is not None:
        choice["stop_reason"] = output.stop_reason
    return choice


def completion_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer, offset: int = 0) -> dict[str, Any]:
    """Parallel lists over tokens; the first text offset, in characters, is `offset`."""
    texts, offsets = [tokenizer.token_text(token.token_id) for token in logprobs], list[int]()
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [finite(token.logprob) for token in logprobs],
        "top_logprobs": [
            {tokenizer.token_text(candidate): finite(logprob) for candidate, logprob in token.top} or None
            for token in logprobs
        ],
        "text_offset": offsets,
    }
