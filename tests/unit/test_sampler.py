"""The sampler against a plain reference, its distributions, and what may not change its choices."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal_gen.errors import Overflowed
from multimodal_gen.kernels import sampling
from multimodal_gen.kernels.sampling import FEW
from multimodal_gen.llm.choosing import wishes_of
from multimodal_gen.llm.logprobs import tell
from multimodal_gen.llm.sampler import Sampler, SamplingRow
from multimodal_gen.text import TextRequest, TextSampling

pytestmark = [pytest.mark.unit]

V = 1000
CPU = torch.device("cpu")


def row(prompt: tuple[int, ...] = (1,), answer: tuple[int, ...] = (), **wishes: Any) -> SamplingRow:
    own = {name: wishes.pop(name) for name in ("seed", "choice", "logprobs", "end_ids", "min_tokens") if name in wishes}
    made = SamplingRow(TextSampling(**wishes), prompt, **own)
    for token in answer:
        made.accept(token)
    return made


def logits_of(rows: int, vocabulary: int = V, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def plain(logits: list[float], row: SamplingRow) -> tuple[list[float], list[float]]:
    """(logits after penalties and biases, probabilities after all), one number after the other."""
    s, values = row.sampling, list(logits)
    answer = {token: int(count) for token, count in zip(row.seen.ids, row.seen.counts, strict=True)} if row.seen else {}
    for token in range(len(values)):
        if s.repetition_penalty != 1 and (token in answer):
            values[token] = (
                values[token] / s.repetition_penalty if values[token] > 0 else values[token] * s.repetition_penalty
            )
        if answer.get(token):
            values[token] -= s.presence_penalty + s.frequency_penalty * answer[token]
        values[token] += s.logit_bias.get(token, 0.0)
    scaled = [-math.inf if t in row.forbidden else value / (s.temperature or 1) for t, value in enumerate(values)]
    best = max(scaled)
    weights = [math.exp(value - best) for value in scaled]
    if 0 < s.top_k < len(weights):
        least = sorted(weights, reverse=True)[s.top_k - 1]
        weights = [w if w >= least else 0.0 for w in weights]
    if s.top_p < 1:
        total, gone, least = sum(weights), 0.0, 0.0
        for weight in sorted(weights, reverse=True):
            gone, least = gone + weight, weight
            if gone >= s.top_p * total:
                break
        weights = [w if w >= least else 0.0 for w in weights]
    weights = [w if w >= s.min_p else 0.0 for w in weights]
    return values, [w / sum(weights) for w in weights]


WISHES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 7},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999, "temperature": 5.0},
    {"min_p": 0.2},
    {"top_k": 50, "top_p": 0.7, "min_p": 0.01},
    {"top_k": 900, "top_p": 0.99, "temperature": 4.0},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"repetition_penalty": 0.8, "presence_penalty": -1.0, "frequency_penalty": 1.5, "top_p": 0.8},
    {"logit_bias": {5: 3.0, 6: -100.0, 999: 2.0}, "top_k": 20},
    {"end_ids": (0, 17), "min_tokens": 9},
]


def test_candidates_and_their_weights_are_those_of_a_plain_reference() -> None:
    logits = logits_of(len(WISHES), scale=2.0)
    rows = [row((3, 5, 5, 9), (5, 700, 5, 31), logprobs=3, **wishes) for wishes in WISHES]
    expected = [plain(values, one) for values, one in zip(logits.tolist(), rows, strict=True)]
    sampled = Sampler().sample(logits, rows)
    for at, (one, (values, weights)) in enumerate(zip(rows, expected, strict=True)):
        kept = [token for token, weight in enumerate(weights) if weight]
        running = list(itertools.accumulate(weights[token] for token in kept))
        place = next(i for i, total in enumerate(running) if total > one.uniform())
        near = {kept[i] for i in range(len(kept)) if abs(running[i] - one.uniform()) < 1e-6} | {kept[place]}
        assert sampled.ids[at] in near, WISHES[at]
        whole = math.log(sum(math.exp(value) for value in values))
        told = sampled.logprobs[at]
        assert told is not None
        assert told.token_id == sampled.ids[at]
        assert told.logprob == pytest.approx(values[told.token_id] - whole, abs=1e-4)
        best = sorted(range(V), key=lambda token: -values[token])[:3]
        assert [token for token, _ in told.top] == best
        assert [logprob for _, logprob in told.top] == pytest.approx([values[t] - whole for t in best], abs=1e-4)


@pytest.mark.parametrize("wishes", WISHES)
def test_draws_follow_the_distribution(wishes: dict[str, Any]) -> None:
    """Chi-square of 10,000 draws over 40 tokens: beyond 5 standard deviations once in millions of runs, and seeds are
    fixed."""
    draws, vocabulary = 10_000, 40
    wishes = {name: value for name, value in wishes.items() if name not in ("logit_bias", "end_ids")}
    logits = logits_of(1, vocabulary, seed=4, scale=1.5)
    one = row((3, 5), (5, 31), **wishes)
    weights = plain(logits[0].tolist(), one)[1]
    counts = [0] * vocabulary
    rows = [row((3, 5), (5, 31), seed=seed, **wishes) for seed in range(draws)]
    for token in Sampler().sample(logits.repeat(draws, 1), rows).ids:
        counts[token] += 1
    assert all(count == 0 for count, weight in zip(counts, weights, strict=True) if weight == 0)
    expected = [(count, weight * draws) for count, weight in zip(counts, weights, strict=True) if weight * draws >= 5]
    square = sum((count - wanted) ** 2 / wanted for count, wanted in expected)
    freedom = max(1, len(expected) - 1)
    assert square < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_choices_and_positions_are_streams_of_their_own() -> None:
    places = itertools.product(range(12), repeat=3)
    numbers = [SamplingRow(TextSampling(), (), seed, choice, length=at).uniform() for seed, choice, at in places]
    assert len(set(numbers)) == len(numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02
    pairs = [(a - 0.5) * (b - 0.5) for a, b in itertools.pairwise(numbers)]
    assert abs(sum(pairs) / len(pairs)) < 0.01, "neighbours are not correlated"


def test_the_batch_around_a_row_changes_nothing() -> None:
    """Bit for bit: logits rounded to bf16, so that many candidates are equally likely."""
    rng = random.Random(0)
    for vocabulary in (V, 49_152):
        logits = logits_of(24, vocabulary, seed=vocabulary).bfloat16().float()
        wishes = [rng.choice(WISHES[:9]) for _ in range(24)]
        made = [row(seed=at, logprobs=rng.choice([None, 0, 5]), **wish) for at, wish in enumerate(wishes)]
        together = Sampler().sample(logits.clone(), made)
        alone = [Sampler().sample(logits[at : at + 1].clone(), [one]) for at, one in enumerate(made)]
        assert together.ids == [one.ids[0] for one in alone]
        assert together.logprobs == [one.logprobs[0] for one in alone]
        order = rng.sample(range(24), 17)
        some = Sampler().sample(logits[order].clone(), [made[at] for at in order])
        assert some.ids == [together.ids[at] for at in order]


def test_candidates_that_are_equally_likely_stay_or_go_together() -> None:
    weights = torch.ones(3, 3 * FEW)
    weights[:, FEW // 2 :] = 0.25
    rows = [row(top_k=10), row(top_p=0.2), row(top_k=FEW, top_p=0.99)]
    assert sampling.limits(weights, wishes_of(rows, CPU)).tolist() == [1.0, 1.0, 0.25]
    assert sampling.limits(torch.ones(1, 3 * FEW), wishes_of([row(top_k=10, top_p=0.5)], CPU)).tolist() == [1.0]
    # As the kernel has it: among the last of those that stay, one is drawn.
    logits = weights.log()
    for at, (one, last) in enumerate(zip(rows, (FEW // 2, FEW // 2, 3 * FEW), strict=True)):
        wishes = replace(wishes_of([one], CPU), uniform=torch.tensor([1 - 2.0**-53], dtype=torch.float64))
        assert sampling.sample(logits[at : at + 1], wishes).tolist() == [last - 1]


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    assert Sampler().sample(logits, [row(temperature=0.0), row(top_k=1, seed=3)]).ids == [1, 3]


def test_end_tokens_do_not_come_before_min_tokens() -> None:
    one = row(temperature=0.0, end_ids=(1,), min_tokens=2)
    chosen = []
    for _ in range(3):
        token = Sampler().sample(torch.tensor([[0.0, 9.0, 5.0]]), [one]).ids[0]
        one.accept(token)
        chosen.append(token)
    assert chosen == [2, 2, 1]


def test_a_row_whose_numbers_overflowed_fails_alone() -> None:
    logits = logits_of(4)
    logits[1, 7] = torch.nan
    logits[2] = -torch.inf
    logits[3, 8] = torch.inf
    sampled = Sampler().sample(logits, [row(temperature=0.0, logprobs=1)] + [row(logprobs=1)] * 3)
    assert sampled.ids[0] >= 0
    assert sampled.ids[1:] == [-1, -1, -1]
    assert [type(sampled.errors.get(at)) for at in range(4)] == [type(None), Overflowed, Overflowed, Overflowed]
    assert [one is None for one in sampled.logprobs] == [False, True, True, True]


def test_a_request_gives_every_choice_its_row() -> None:
    request = TextRequest(
        id="r", prompt=(1, 2), max_tokens=5, n=2, min_tokens=1, logprobs=4, sampling=TextSampling(seed=9)
    )
    rows = [SamplingRow.of(request, choice, (2,)) for choice in range(2)]
    assert [(one.seed, one.choice, one.logprobs, one.forbidden) for one in rows] == [(9, 0, 4, (2,)), (9, 1, 4, (2,))]
    assert rows[0].uniform() != rows[1].uniform()
    before = rows[0].uniform()
    rows[0].accept(7)
    assert rows[0].uniform() != before
    assert rows[0].forbidden == ()


def test_an_empty_step_chooses_nothing() -> None:
    assert Sampler().sample(torch.empty(0, V), []).ids == []


def test_what_is_told_of_a_prompt_is_its_log_softmax() -> None:
    logits = logits_of(150, 300)
    ids = [at % 300 for at in range(150)]
    told = tell(logits, ids, 2)
    expected = logits.log_softmax(-1)
    assert [one.logprob for one in told] == pytest.approx(
        [expected[at, token].item() for at, token in enumerate(ids)], abs=1e-4
    )
    assert [one.top[0][0] for one in told] == logits.argmax(-1).tolist()
    assert all(len(one.top) == 2 for one in told)
    assert tell(logits[:3], ids[:3], 0)[1].top == ()
