"""Random bodies for the routes of text: mostly fields of the right shape, mixed, and some of any shape."""

from __future__ import annotations

import random
from typing import Any

from multimodal_gen.server.text_schemas import ChatWish, CompletionWish, DetokenizeWish, TokenizeWish

CHAT = "/v1/chat/completions"
ROUTES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    CHAT: (ChatWish, {"messages": [{"role": "user", "content": "hi"}]}),
    "/v1/completions": (CompletionWish, {"prompt": "hi"}),
    "/v1/tokenize": (TokenizeWish, {"prompt": "hi"}),
    "/v1/detokenize": (DetokenizeWish, {"tokens": [1]}),
}
"""path → (what it reads, what it must have)"""
_WORDS = ("type", "function", "name", "role", "content", "text", "parameters", "schema", "properties", "items", "$ref")
_TEXTS = ("", "a", "auto", "required", "none", "x" * 50, "\x00", "<|im_end|>", "json_object", "object", "string", "#")
_NUMBERS = (0, 1, -1, 2, 10**6, 2**63, 2**70, 0.0, 0.5, 1e308, 1e-9)
_FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
_GOOD: dict[str, tuple[Any, ...]] = {
    "messages": (
        [{"role": "assistant", "content": "hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "tool", "content": "b"}],
    ),
    "tools": ([{"type": "function", "function": _FUNCTION}],),
    "tool_choice": ("auto", "none", "required", {"type": "function", "function": {"name": "f"}}),
    "response_format": ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {"enum": [1]}}}),
    "prompt": ("hi", [1, 2], ["a", "b"], [[1], [2]]),
    "tokens": ([1, 2], []),
    "regex": ("a+", "(", "[0-9]"),
    "ebnf": ('root ::= "a" | "b"', "root ::= root"),
    "stop": (["x"], "y"),
    "stop_token_ids": ([2, 5],),
    "logit_bias": ({"5": 1},),
    "stream_options": ({"include_usage": True},),
    "chat_template_kwargs": ({"enable_thinking": False},),
    "model": ("smollm2",),
    "n": (1, 2, 3),
    "temperature": (0, 0.7, 2.0),
    "top_p": (0.0, 0.5, 1.0),
    "top_k": (-1, 1, 40),
    "min_p": (0.0, 0.3),
    "repetition_penalty": (0.5, 1.2),
    "frequency_penalty": (-2.0, 1.0),
    "presence_penalty": (-1.0, 2.0),
    "min_tokens": (0, 1, 2),
    "seed": (0, 7),
    "logprobs": (True, False, 0, 2),
    "top_logprobs": (0, 3),
    "max_tokens": (0, 1, 3),
    "max_completion_tokens": (1, 3),
}


def random_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """(path, body) of a request that writes a few tokens at most."""
    path = rng.choice([CHAT, CHAT, *ROUTES])
    schema, needed = ROUTES[path]
    fields = sorted(set(schema.model_fields) - {"max_tokens", "max_completion_tokens"})
    body = dict(needed)
    for name in rng.sample(fields, min(len(fields), rng.randrange(1, 6))):
        body[name] = rng.choice(_GOOD.get(name, (True, False))) if rng.random() < 0.9 else _anything(rng)
    if path in (CHAT, "/v1/completions"):
        body["max_tokens"] = rng.choice(_GOOD["max_tokens"])
    return path, body


def _anything(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(6 if depth < 4 else 4)
    if kind == 4:
        return [_anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(_WORDS): _anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice((_TEXTS, _NUMBERS, (None, True, False), _TEXTS)[kind])
