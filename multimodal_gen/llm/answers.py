"""Deltas → whole answers: what every face that does not stream gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from multimodal_gen.messages import TextDelta, TextFinished
from multimodal_gen.text import FinishReason, TextOutput, TextRequest, TokenLogprob


@dataclass
class _Answer:
    """One choice as far as it is written."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None  # set by the last delta
    stop_reason: str | int | None = None  # set by the last delta


class Answers:
    """The choices of one request."""

    def __init__(self, request: TextRequest) -> None:
        self.request = request
        self._answers = [_Answer() for _ in range(request.n)]

    def note(self, delta: TextDelta) -> None:
        """Take in what a step has added."""
        answer = self._answers[delta.index]
        answer.texts.append(delta.text)
        answer.token_ids += delta.token_ids
        answer.logprobs += delta.logprobs
        if delta.finish is not None:
            answer.finish, answer.stop_reason = delta.finish, delta.stop_reason

    def outputs(self, finished: TextFinished) -> list[TextOutput]:
        """All choices, once the request is finished."""
        outputs = []
        for answer in self._answers:
            assert answer.finish is not None, "a request is finished when its choices are"
            outputs.append(
                TextOutput(
                    text="".join(answer.texts),
                    token_ids=tuple(answer.token_ids),
                    finish_reason=answer.finish,
                    logprobs=None if self.request.logprobs is None else tuple(answer.logprobs),
                    stop_reason=answer.stop_reason,
                    usage=finished.usage,
                )
            )
        return outputs
