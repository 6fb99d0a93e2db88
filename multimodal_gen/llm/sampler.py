"""From logits to tokens, for all rows of a step at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multimodal_gen.errors import GenerationFailed, MmgenError, Overflowed
from multimodal_gen.kernels.sampling import best
from multimodal_gen.llm.choosing import choose
from multimodal_gen.llm.grammar.masks import mask
from multimodal_gen.llm.logprobs import Thoughts
from multimodal_gen.llm.penalties import add_biases, forbid, penalise
from multimodal_gen.llm.sampling import Sampled, SamplingRow
from multimodal_gen.text import TokenLogprob

__all__ = ["Sampled", "Sampler", "SamplingRow"]


class Sampler:
    """Keeps nothing between steps: what an answer has gathered is in its row."""

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
        """A token for each row of logits, float32 [R, V], which are overwritten.

        Greedy rows get the most likely token, the one with the smallest id where several are. A row for which nothing
        can be chosen gets an error of its own.
        """
        assert len(logits) == len(rows), f"{len(logits)} rows of logits for {len(rows)} answers"
        if not rows:
            return Sampled([], [], {})
        penalise(logits, rows)
        add_biases(logits, rows)
        told = [at for at, row in enumerate(rows) if row.logprobs is not None]
        thoughts = self._thoughts(logits, rows, told) if told else None
        forbid(logits, rows)
        mask(logits, rows)
        errors: dict[int, MmgenError] = {}
        ids = self._choose(logits, rows, errors)
        answers: list[TokenLogprob | None] = [None] * len(rows)
        if thoughts is not None:
            chosen = logits[told, [max(0, ids[at]) for at in told]]
            for at, answer in zip(told, thoughts.tell([ids[i] for i in told], chosen, _tops(rows, told)), strict=True):
                answers[at] = answer if at not in errors else None
        return Sampled(ids, answers, errors)

    def _thoughts(self, logits: Tensor, rows: Sequence[SamplingRow], told: list[int]) -> Thoughts:
        return Thoughts.of(logits if len(told) == len(rows) else logits[told], _tops(rows, told))

    def _choose(self, logits: Tensor, rows: Sequence[SamplingRow], errors: dict[int, MmgenError]) -> list[int]:
        highest, places = best(logits)
        ids = places.tolist()
        for at, value in enumerate(highest.tolist()):
            if not -torch.inf < value < torch.inf:
                errors[at] = _why(rows[at], value)
        drawn = [at for at, row in enumerate(rows) if not row.greedy and at not in errors]
        if drawn:
            chosen = choose(logits if len(drawn) == len(rows) else logits[drawn], [rows[at] for at in drawn])
            for at, token in zip(drawn, chosen.tolist(), strict=True):
                ids[at] = token
        return [-1 if at in errors else token for at, token in enumerate(ids)]


def _why(row: SamplingRow, best: float) -> MmgenError:
    """Nothing can be chosen, since this is the best logit."""
    if row.matcher is not None and best == -torch.inf:
        return GenerationFailed("The answer came to a place where its grammar allows no token; nothing can match it.")
    return Overflowed("The model's numbers overflowed; nothing can be chosen from them.")


def _tops(rows: Sequence[SamplingRow], told: list[int]) -> list[int]:
    return [rows[at].logprobs or 0 for at in told]
