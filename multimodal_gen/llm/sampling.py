"""What the sampler needs to know of one answer, and what it gives back. No torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from struct import Struct
from typing import Any, Protocol

from multimodal_gen.errors import MmgenError
from multimodal_gen.text import TextRequest, TextSampling, TokenLogprob

_PLACE = Struct("<qQQ")
_UNIT = 2.0**-53


class TokenMatcher(Protocol):
    """Where one answer is in its grammar (`llm/grammar/matcher.py`)."""

    def fill(self, mask: Any, row: int) -> bool:
        """Write which tokens may follow into a row of an int32 bit mask [rows, V / 32]; False: all of them."""

    def accept(self, token_id: int) -> None:
        """The answer has one more token. Raises: GenerationFailed where the grammar has no place for it."""

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete, and was left by an end token: nothing can follow."""


class Seen:
    """Tokens that penalties look at, in order of their first appearance, with how often the answer has them."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self.ids = array("q", dict.fromkeys(prompt))
        self.counts = array("f", bytes(4 * len(self.ids)))
        self._place = {token: place for place, token in enumerate(self.ids)}

    def add(self, token_id: int) -> None:
        """The answer has one more token."""
        place = self._place.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.counts.append(0.0)
        self.counts[place] += 1.0


@dataclass(slots=True)
class SamplingRow:
    """One answer, as the sampler sees it, from its first token to its last; made once by the engine core.

    It is the same after preemption and in any batch: what is chosen depends on nothing else than this and the logits.
    """

    sampling: TextSampling
    prompt: Sequence[int]
    seed: int = 0
    choice: int = 0
    logprobs: int | None = None  # best candidates to tell of each token; None: nothing is told
    end_ids: tuple[int, ...] = ()  # tokens that end the answer, not to be chosen before min_tokens
    min_tokens: int = 0
    matcher: TokenMatcher | None = None
    length: int = 0  # tokens of the answer; kept by `accept`
    seen: Seen | None = field(default=None, init=False)  # where there are penalties; kept by `accept`

    def __post_init__(self) -> None:
        s = self.sampling
        if s.repetition_penalty != 1.0 or s.presence_penalty or s.frequency_penalty:
            # Presence and frequency look at the answer alone: the prompt's tokens need no place then.
            self.seen = Seen(self.prompt if s.repetition_penalty != 1.0 else ())

    @classmethod
    def of(
        cls, request: TextRequest, choice: int, end_ids: tuple[int, ...], matcher: TokenMatcher | None = None
    ) -> SamplingRow:
        """Choice number `choice` of a request. `end_ids`: the model's end tokens (none with ignore_eos) and the
        request's own."""
        return cls(
            request.sampling,
            request.prompt,
            request.sampling.seed or 0,
            choice,
            request.logprobs,
            end_ids,
            request.min_tokens,
            matcher,
        )

    def accept(self, token_id: int) -> None:
        """The answer has one more token: on every rank, the one that rank 0 chose. Raises: GenerationFailed where the
        grammar has no place for it."""
        self.length += 1
        if self.seen is not None:
            self.seen.add(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.sampling.temperature == 0.0 or self.sampling.top_k == 1

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Tokens that must not come yet."""
        return self.end_ids if self.length < self.min_tokens else ()

    def uniform(self) -> float:
        """The number in [0, 1) that decides this token: a function of seed, choice and position alone."""
        digest = blake2b(_PLACE.pack(self.seed, self.choice, self.length), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * _UNIT


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was chosen, by row."""

    ids: list[int]  # -1 where an error stands
    logprobs: list[TokenLogprob | None]  # None where nothing was to be told
    errors: dict[int, MmgenError]  # row → why no token could be chosen for it; the other rows are good
