"""From a wish to a settled `TextRequest`: every open value filled from the model's card, every value checked.

No torch, no I/O. Errors name the field and say what would be right. Who asks has tokenized the prompt, compiled the
grammar and found the adapter already.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from multimodal_gen.errors import ContextExceeded, InvalidN, InvalidValue
from multimodal_gen.request import MAX_SEED
from multimodal_gen.text import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOPS,
    Grammar,
    TextCard,
    TextRequest,
    TextSampling,
)

MAX_STOP_CHARS = 512
MAX_STOP_TOKENS = 256
MIN_TEMPERATURE = 1e-3
"""smaller ones but 0 would overflow the logits"""


class TextParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to write an answer: the keywords of `LLM.generate`. What is left None takes the checkpoint's choice, else
    what changes nothing."""

    max_tokens: int | None = None
    """of each answer; None: what the context leaves"""
    n: int = 1
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    """0 and -1: all"""
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """None: drawn here"""
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: bool = False
    priority: int = 0
    deadline_s: float | None = None


# Name → (least, most) of the numbers that need nothing else to be judged.
_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 10.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


def settle(
    request_id: str,
    prompt: Sequence[int],
    params: TextParams,
    *,
    card: TextCard,
    context: int,
    grammar: Grammar | None = None,
    adapter: str | None = None,
    fair_key: str = "",
    routing_key: str | None = None,
    keep_prefix: int = 0,
) -> TextRequest:
    """The engine's request for token ids and a wish. `context`: tokens of prompt and answer together.

    Raises: ContextExceeded with both numbers; the InvalidValue family, naming the field.
    """
    max_tokens = _answer_tokens(len(prompt), params.max_tokens, context)
    check_ids(prompt, "prompt", card.vocab_size)
    deadline = params.deadline_s
    return TextRequest(
        id=request_id,
        prompt=tuple(prompt),
        max_tokens=max_tokens,
        n=_whole(params.n, "n", 1, MAX_CHOICES, InvalidN),
        min_tokens=_whole(params.min_tokens, "min_tokens", 0, max_tokens),
        sampling=_sampling(params, card),
        stop=_stops(params.stop),
        stop_token_ids=_stop_ids(params.stop_token_ids, card.vocab_size),
        include_stop=params.include_stop,
        ignore_eos=params.ignore_eos,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
        logprobs=None if params.logprobs is None else _whole(params.logprobs, "logprobs", 0, MAX_LOGPROBS),
        prompt_logprobs=params.prompt_logprobs,
        grammar=grammar,
        adapter=adapter,
        keep_prefix=keep_prefix,
        priority=_whole(params.priority, "priority", -100, 100),
        deadline_s=None if deadline is None else _number(deadline, "deadline_s", 1e-3, 86_400.0),
        fair_key=fair_key,
        routing_key=routing_key,
    )


def _answer_tokens(prompt: int, wanted: int | None, context: int) -> int:
    """The answer's length in tokens, within the context."""
    if prompt < 1:
        raise InvalidValue("'prompt' is empty: it needs one token at least.", param="prompt")
    if prompt >= context:
        raise ContextExceeded(
            f"The prompt has {prompt:,} tokens and the context of this model is {context:,}, which must hold the "
            "answer, too. Shorten the prompt.",
            param="prompt",
        )
    if wanted is None:
        return context - prompt
    tokens = _whole(wanted, "max_tokens", 1, MAX_SEED)
    if prompt + tokens > context:
        raise ContextExceeded(
            f"The prompt has {prompt:,} tokens and the answer may have {tokens:,}: together more than the "
            f"{context:,} of this model's context. Shorten the prompt, or ask for at most {context - prompt:,}.",
            param="max_tokens",
        )
    return tokens


def _sampling(params: TextParams, card: TextCard) -> TextSampling:
    wishes, defaults = msgspec.structs.asdict(params), msgspec.structs.asdict(card.defaults)
    chosen: dict[str, Any] = {
        name: defaults[name] if wishes[name] is None else _number(wishes[name], name, least, most)
        for name, (least, most) in _NUMBERS.items()
    }
    if 0.0 < chosen["temperature"] < MIN_TEMPERATURE:
        raise InvalidValue(
            f"'temperature' must be 0, which takes the likeliest token, or at least {MIN_TEMPERATURE:g}, got "
            f"{chosen['temperature']:g}.",
            param="temperature",
        )
    top_k = card.defaults.top_k if params.top_k is None else _whole(params.top_k, "top_k", -1, MAX_SEED)
    if chosen["top_p"] == 0.0:  # the smallest set of candidates is the best one alone
        chosen["top_p"], top_k = 1.0, 1
    seed = secrets.randbits(63) if params.seed is None else _whole(params.seed, "seed", 0, MAX_SEED)
    bias = _biases(params.logit_bias, card.vocab_size)
    return TextSampling(**chosen, top_k=min(max(top_k, 0), card.vocab_size), seed=seed, logit_bias=bias)


def _biases(biases: Mapping[int, float], vocab: int) -> dict[int, float]:
    if not isinstance(biases, Mapping):
        raise InvalidValue(f"'logit_bias' must map token ids to numbers, got {_shown(biases)}.", param="logit_bias")
    if len(biases) > MAX_LOGIT_BIAS:
        raise InvalidValue(
            f"'logit_bias' may name at most {MAX_LOGIT_BIAS:,} tokens, got {len(biases):,}.", param="logit_bias"
        )
    check_ids(biases, "logit_bias", vocab)
    return {token: _number(bias, "logit_bias", -100.0, 100.0) for token, bias in biases.items()}


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(stop, Sequence):
        raise InvalidValue(f"'stop' must be a text or a list of texts, got {_shown(stop)}.", param="stop")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise InvalidValue(f"'stop' may hold at most {MAX_STOPS} texts, got {len(stops):,}.", param="stop")
    for text in stops:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidValue(f"Each text of 'stop' must have 1 to {MAX_STOP_CHARS} characters.", param="stop")
    return tuple(dict.fromkeys(stops))


def _stop_ids(ids: Sequence[int], vocab: int) -> tuple[int, ...]:
    if not isinstance(ids, Sequence):
        raise InvalidValue(f"'stop_token_ids' must be a list of token ids, got {_shown(ids)}.", param="stop_token_ids")
    if len(ids) > MAX_STOP_TOKENS:
        raise InvalidValue(
            f"'stop_token_ids' may hold at most {MAX_STOP_TOKENS} tokens, got {len(ids):,}.", param="stop_token_ids"
        )
    check_ids(ids, "stop_token_ids", vocab)
    return tuple(dict.fromkeys(ids))


def check_ids(ids: Sequence[int] | Mapping[int, float], param: str, vocab: int) -> None:
    """Raises: InvalidValue for what is no token of the model."""
    if not all(type(token) is int for token in ids):
        raise InvalidValue(f"{param!r} must hold whole numbers, the ids of tokens.", param=param)
    if not all(0 <= token < vocab for token in ids):
        raise InvalidValue(
            f"{param!r} holds a token id that this model does not have; they go from 0 to {vocab - 1:,}.", param=param
        )


def _whole(value: object, name: str, least: int, most: int, error: type[InvalidValue] = InvalidValue) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        top = "2^63 - 1" if most == MAX_SEED else f"{most:,}"
        raise error(f"{name!r} must be a whole number from {least:,} to {top}, got {_shown(value)}.", param=name)
    return value


def _number(value: object, name: str, least: float, most: float) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most:  # no NaN passes
        return float(value)
    raise InvalidValue(f"{name!r} must be a number from {least:g} to {most:g}, got {_shown(value)}.", param=name)


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of more than 38 digits"
    return ascii(value)[:60]
