"""Pictures and text share one engine: who waits for whom, and for how long."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from multimodal_gen.adapters import Side
from multimodal_gen.engine.arbiter import PATIENCE, Arbiter

pytestmark = [pytest.mark.unit]


@dataclass
class Shared:
    """How a stretch of time was shared out."""

    tokens: int
    picture_steps: int
    seconds: float
    sides: list[Side]
    longest_wait_s: float  # of pictures for a step

    @property
    def per_token(self) -> float:
        return self.seconds / self.tokens

    @property
    def picture_share(self) -> float:
        return 1 - self.text_seconds / self.seconds

    text_seconds: float = 0.0


def share(budget_s: float, token_s: float, denoise_s: float, seconds: float, jitter: float = 0.0) -> Shared:
    """Both sides have work all the time."""
    arbiter, chance = Arbiter(budget_s), random.Random(7)
    result, waited = Shared(0, 0, 0.0, [], 0.0), 0.0
    while result.seconds < seconds:
        side = arbiter.choose(pictures=True, text=True)
        assert side is not None
        took = (token_s if side == "text" else denoise_s) * chance.uniform(1 - jitter, 1 + jitter)
        arbiter.ran(side, took, pictures=True, text=True)
        result.seconds += took
        result.sides.append(side)
        if side == "text":
            result.tokens += 1
            result.text_seconds += took
            waited += took
        else:
            result.picture_steps += 1
            result.longest_wait_s, waited = max(result.longest_wait_s, waited), 0.0
    return result


def test_a_side_that_is_alone_always_runs_and_nothing_runs_where_there_is_nothing() -> None:
    arbiter = Arbiter(0.1)
    assert arbiter.choose(pictures=False, text=False) is None
    for _ in range(3):
        assert arbiter.choose(pictures=True, text=False) == "pictures"
        arbiter.ran("pictures", 5.0, pictures=True, text=False)
    for _ in range(3):
        assert arbiter.choose(pictures=False, text=True) == "text"
        arbiter.ran("text", 5.0, pictures=False, text=True)


@pytest.mark.parametrize(("token_s", "denoise_s"), [(0.01, 0.05), (0.01, 0.2), (0.01, 2.0), (0.1, 0.3), (0.002, 0.001)])
def test_a_token_takes_the_budget_on_average_and_pictures_get_the_rest(token_s: float, denoise_s: float) -> None:
    budget, patience_share = 0.15, 1 / (1 + PATIENCE)
    shared = share(budget, token_s, denoise_s, seconds=200 * (budget + denoise_s), jitter=0.2)
    at_most = max(budget, token_s / (1 - patience_share))
    assert shared.per_token <= 1.1 * at_most
    assert shared.per_token >= 0.85 * budget, "pictures get what text can spare"


@pytest.mark.parametrize("token_s", [0.15, 0.2, 1.0])
def test_pictures_get_a_fifth_of_the_time_where_text_can_spare_nothing(token_s: float) -> None:
    shared = share(0.15, token_s, denoise_s=0.5, seconds=500.0)
    assert shared.picture_share > 0.8 / (1 + PATIENCE) * 0.5
    assert shared.longest_wait_s <= PATIENCE * 0.5 + token_s + 1e-9


def test_nobody_waits_for_ever_whatever_steps_take() -> None:
    chance = random.Random(3)
    for _ in range(200):
        token_s, denoise_s = 10 ** chance.uniform(-3, 1), 10 ** chance.uniform(-3, 1)
        shared = share(chance.choice([0.001, 0.05, 0.15, 5.0]), token_s, denoise_s, 60 * (token_s + denoise_s), 0.5)
        assert shared.picture_steps > 0
        assert shared.tokens > 0
        assert shared.longest_wait_s <= 1.5 * (PATIENCE * denoise_s * 1.5 + token_s)


def test_a_token_that_comes_after_a_pause_is_next() -> None:
    """What pictures did while nobody wrote is not held against the text, nor what was saved before."""
    arbiter = Arbiter(0.15)
    for _ in range(20):
        side = arbiter.choose(pictures=True, text=True)
        assert side is not None
        arbiter.ran(side, 0.01 if side == "text" else 1.0, pictures=True, text=True)
    for _ in range(5):
        assert arbiter.choose(pictures=True, text=False) == "pictures"
        arbiter.ran("pictures", 1.0, pictures=True, text=False)
    assert arbiter.choose(pictures=True, text=True) == "text"


def test_a_hiccup_of_a_minute_is_not_paid_for_with_a_minute() -> None:
    arbiter = Arbiter(0.15)
    arbiter.ran("pictures", 0.2, pictures=True, text=True)
    arbiter.ran("text", 60.0, pictures=True, text=True)
    waited = 0.0
    while arbiter.choose(pictures=True, text=True) == "text":
        arbiter.ran("text", 0.01, pictures=True, text=True)
        waited += 0.01
    assert waited < 1.0


def test_ranks_that_are_told_the_same_choose_the_same() -> None:
    def choices() -> list[Side | None]:
        arbiter, chance, made = Arbiter(0.05), random.Random(11), list[Side | None]()
        for _ in range(500):
            pictures, text = chance.random() < 0.8, chance.random() < 0.8
            made.append(arbiter.choose(pictures=pictures, text=text))
            if made[-1] is not None:
                arbiter.ran(made[-1], chance.expovariate(20.0), pictures=pictures, text=text)
        return made

    assert choices() == choices()


def test_while_text_is_written_a_denoising_step_is_no_larger_than_a_budget() -> None:
    arbiter = Arbiter(0.1)
    assert arbiter.most_tokens(text=True) is None, "nobody knows yet what a token takes"
    arbiter.ran("pictures", 0.4, pictures=True, text=False, tokens=800)
    assert arbiter.most_tokens(text=False) is None
    assert arbiter.most_tokens(text=True) == 200
    for _ in range(30):
        arbiter.ran("pictures", 1.0, pictures=True, text=True, tokens=100)
    assert arbiter.most_tokens(text=True) == pytest.approx(10, abs=1)


def test_pieces_of_decoding_say_nothing_of_the_next_step_and_have_their_share_of_the_time() -> None:
    arbiter, seconds = Arbiter(0.01), dict.fromkeys(("text", "pictures"), 0.0)  # text can spare nothing
    arbiter.ran("pictures", 1.0, pictures=True, text=True, tokens=64)
    for _ in range(1000):
        side = arbiter.choose(pictures=True, text=True)
        assert side is not None
        took = 0.1 if side == "text" else 0.05
        arbiter.ran(side, took, pictures=True, text=True, piece=side == "pictures")
        seconds[side] += took
    assert seconds["pictures"] / sum(seconds.values()) == pytest.approx(1 / (1 + PATIENCE), rel=0.1)
    arbiter.ran("pictures", 1.0, pictures=True, text=True, tokens=64)
    waited = 0
    while arbiter.choose(pictures=True, text=True) == "text":
        arbiter.ran("text", 0.1, pictures=True, text=True)
        waited += 1
    assert waited == pytest.approx(PATIENCE / 0.1, abs=1), "the next step is still expected to take a second"
