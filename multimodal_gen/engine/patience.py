"""How long a worker may be silent in the middle of work before it counts as hung. Pure Python: no clocks, no I/O.

Five times the longest silence so far is a safe limit only for work that is no larger than what has been done before:
the first 1024 px image after a hundred of 64 px takes longer than all of them together. So the worker has the whole
`step_timeout_s` until it has finished a request as large as any in its hands and made a step as large as those to come.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from multimodal_gen.request import GenerationRequest

FACTOR = 5.0
LEAST_SECONDS = 30.0


@dataclass
class Patience:
    """What has been seen of one worker since it started."""

    most: float  # seconds: the setting step_timeout_s
    batch_tokens: int = 0  # filled when it is ready: tokens of a step of several rows
    longest: float = 0.0  # filled by spoke: seconds of silence in the middle of work
    stepped: int = 0  # filled by spoke: tokens of the largest step
    decoded: int = 0  # filled by finished: tokens of the largest request that was decoded, all its rows together

    def spoke(self, silence: float, step_tokens: int = 0) -> None:
        """A message came after `silence` seconds of work; `step_tokens` where it tells of a step."""
        self.longest = max(self.longest, silence)
        self.stepped = max(self.stepped, step_tokens)

    def finished(self, request: GenerationRequest) -> None:
        """A request is done."""
        if request.output == "pixels":
            self.decoded = max(self.decoded, request.row_tokens * request.n)

    def limit(self, held: Iterable[GenerationRequest]) -> float:
        """Seconds of silence that are natural with these requests in its hands.

        Adapters may have to be merged before any step, which takes a time of its own.
        """
        requests = list(held)
        rows = max((request.row_tokens for request in requests), default=0)
        whole = [request.row_tokens * request.n for request in requests]
        step = min(sum(whole), max(self.batch_tokens, rows))
        known = step <= self.stepped and max(whole, default=0) <= self.decoded
        if not known or any(request.loras for request in requests):
            return self.most
        return min(self.most, max(LEAST_SECONDS, FACTOR * self.longest))
