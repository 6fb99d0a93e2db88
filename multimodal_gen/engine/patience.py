"""How long a worker may be silent in the middle of work before it counts as hung. Pure Python: no clocks, no I/O.

Five times the longest silence so far is a safe limit only for work that is no larger than what has been done before:
the first 1024 px image after a hundred of 64 px takes longer than all of them together. So the worker has the whole
`step_timeout_s` until it has finished a request as large as any in its hands and made a step as large as those to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from multimodal_gen.request import GenerationRequest
from multimodal_gen.text import TextRequest

FACTOR = 5.0
LEAST_SECONDS = 30.0


@dataclass
class Patience:
    """What has been seen of one worker since it started."""

    most: float  # seconds: the setting step_timeout_s
    batch_tokens: int = 0  # filled when it is ready: tokens of a step of several rows
    chunk_tokens: int = 0  # filled when it is ready: tokens of prompts in a step of text
    longest: float = 0.0  # filled by spoke: seconds of silence in the middle of work
    stepped: int = 0  # filled by spoke: tokens of the largest step
    decoded: int = 0  # filled by finished: tokens of the largest request that was decoded, all its rows together
    text_stepped: int = 0  # filled by spoke: tokens of the largest step of text

    def spoke(self, silence: float, step_tokens: int = 0, text_tokens: int = 0) -> None:
        """A message came after `silence` seconds of work; `step_tokens` or `text_tokens` where it tells of a step."""
        self.longest = max(self.longest, silence)
        self.stepped = max(self.stepped, step_tokens)
        self.text_stepped = max(self.text_stepped, text_tokens)

    def finished(self, request: GenerationRequest | TextRequest) -> None:
        """A request is done."""
        if not isinstance(request, TextRequest) and request.output == "pixels":
            self.decoded = max(self.decoded, request.row_tokens * request.n)

    def limit(self, held: Iterable[GenerationRequest | TextRequest]) -> float:
        """Seconds of silence that are natural with these requests in its hands."""
        requests = list(held)
        texts = [request for request in requests if isinstance(request, TextRequest)]
        pictures = [request for request in requests if not isinstance(request, TextRequest)]
        if self._knows_texts(texts) and self._knows_pictures(pictures):
            return min(self.most, max(LEAST_SECONDS, FACTOR * self.longest))
        return self.most

    def _knows_pictures(self, requests: Sequence[GenerationRequest]) -> bool:
        """Whether as much has been done before. Adapters may have to be merged before any step: a time of its own."""
        rows = max((request.row_tokens for request in requests), default=0)
        whole = [request.row_tokens * request.n for request in requests]
        step = min(sum(whole), max(self.batch_tokens, rows))
        known = step <= self.stepped and max(whole, default=0) <= self.decoded
        return known and not any(request.loras for request in requests)

    def _knows_texts(self, requests: Sequence[TextRequest]) -> bool:
        """Whether a step has read as much of prompts before; what the prefix cache holds is not read."""
        return min(sum(len(request.prompt) for request in requests), self.chunk_tokens) <= self.text_stepped
