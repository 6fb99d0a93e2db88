"""Random JSON schemas whose answers have an end, and a sampler's logits that like to come to it."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from multimodal_gen.llm.tokenizer import Tokenizer

NAMES = ("a", "name", "größe", "x_1", "with space", "Ω", 'quo"te', "id", "tags", "n")


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """One of the kinds below; nested up to two deep."""
    kinds = [_string, _integer, _number, _values, _simple]
    if depth < 2:
        kinds += [_object, _array, _either, _reference] * 2
    return (_object if depth == 0 and rng.random() < 0.7 else rng.choice(kinds))(rng, depth)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(["^[a-z]{1,8}$", "^(foo|bar)-[0-9]{2}$", r"^\d{3}-\d{4}$"])}
    if kind == 1:
        return {"type": "string", "format": rng.choice(["date", "uuid", "ipv4", "date-time"])}
    least = rng.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(12)}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randrange(-1000, 1000)
    names = rng.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
    return {"type": "integer", names[0]: least, names[1]: least + rng.randrange(2, 500)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randrange(-100, 100) / 4
    return {"type": "number", "minimum": least, "maximum": least + rng.randrange(1, 40) / 8}


def _values(rng: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = ["red", "grün", 3, 2.5, None, True, "", {"k": [1]}, 'a"b\\c']
    if rng.random() < 0.3:
        return {"const": rng.choice(values)}
    return {"enum": rng.sample(values, rng.randrange(1, 5))}


def _simple(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]]), "description": "nothing"}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randrange(1, 5))
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
    }
    if rng.random() < 0.5:
        made["additionalProperties"] = False
    return made


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        parts = [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 3))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    least = rng.randrange(3)
    return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": least, "maxItems": least + 2}


def _either(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))], "title": "either"}


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth == 0:
        inner = random_schema(rng, 1)
        return {"$defs": {"inner": inner}, "type": "object", "properties": {"it": {"$ref": "#/$defs/inner"}}}
    # Through an array: a reference to itself and nothing else has no end, in jsonschema neither.
    own = {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}
    return own if rng.random() < 0.2 else _string(rng, depth)


def hasty_logits(tokenizer: Tokenizer, generator: torch.Generator) -> Tensor:
    """float32 [1, V]: noise that prefers tokens which close something, and the end."""
    logits = torch.randn(1, tokenizer.vocab_size, generator=generator)
    for token in _closing(tokenizer):
        logits[0, token] += 9.0
    for token in tokenizer.eos_ids:
        logits[0, token] += 30.0
    return logits


_found: dict[int, list[int]] = {}


def _closing(tokenizer: Tokenizer) -> list[int]:
    if id(tokenizer) not in _found:
        short = {b'"', b"]", b"}", b'"}', b'"]', b"null", b"}}", b'",'}
        _found[id(tokenizer)] = [at for at, token in enumerate(tokenizer.vocabulary.tokens) if token in short]
    return _found[id(tokenizer)]
