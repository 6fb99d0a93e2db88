"""From a wish for text to a settled request."""

from __future__ import annotations

from typing import Any

import pytest

from multimodal_gen.errors import ContextExceeded, InvalidN, InvalidValue
from multimodal_gen.llm.asking import TextParams, settle
from multimodal_gen.text import TextCard, TextRequest, TextSampling

pytestmark = [pytest.mark.unit]

CARD = TextCard(
    name="tiny", family="llama", path="tiny", format="safetensors", context=100, vocab_size=50, layers=1, heads=1,
    kv_heads=1, head_dim=8, parameters=1, weight_bytes=1, eos_ids=(0,),
    defaults=TextSampling(temperature=0.6, top_k=20, top_p=0.95),
)  # fmt: skip


def ask(prompt: tuple[int, ...] = (1, 2, 3), context: int = 100, **wish: Any) -> TextRequest:
    return settle("r1", prompt, TextParams(**wish), card=CARD, context=context)


def test_what_is_left_open_is_the_checkpoints_choice() -> None:
    sampling = ask().sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.6, 20, 0.95, 0.0)
    sampling = ask(temperature=0, top_k=-1, top_p=0.5).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 0, 0.5)


def test_top_p_of_nothing_takes_the_best_token_alone() -> None:
    sampling = ask(top_p=0.0, top_k=7).sampling
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


def test_a_seed_is_drawn_where_none_is_given() -> None:
    seeds = {ask().sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert ask(seed=7).sampling.seed == 7


def test_an_answer_without_a_limit_may_fill_the_context() -> None:
    assert ask().max_tokens == 97
    assert ask(max_tokens=97).max_tokens == 97


def test_a_full_context_names_both_numbers() -> None:
    with pytest.raises(ContextExceeded, match=r"120 tokens.* is 100") as caught:
        ask(prompt=(1,) * 120)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(ContextExceeded, match=r"98.*100.*97") as caught:
        ask(max_tokens=98)
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": 2}, "stop_token_ids"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**5000}, "seed"),
        ({"logit_bias": {50: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 101.0}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": 10**6}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x" * 513]}, "stop"),
        ({"stop": [str(i) for i in range(17)]}, "stop"),
        ({"stop_token_ids": [50]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
        ({"priority": 101}, "priority"),
        ({"deadline_s": 0}, "deadline_s"),
    ],
)
def test_a_value_out_of_bounds_names_its_field(wish: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        ask(**wish)
    assert caught.value.param == param
    assert len(caught.value.message) < 250
    assert isinstance(caught.value, InvalidN) == (param == "n")


@pytest.mark.parametrize("prompt", [(), (50,), (-1,), (True,)])
def test_a_prompt_of_wrong_ids_is_refused(prompt: tuple[int, ...]) -> None:
    with pytest.raises(InvalidValue) as caught:
        ask(prompt=prompt)
    assert caught.value.param == "prompt"
