"""The JSON types that a schema allows."""

from __future__ import annotations

import time
from typing import Any

import pytest

from multimodal_gen.llm.parsers.types import ALL, types_of, value_of

pytestmark = [pytest.mark.unit]


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"enum": ["a", 1, None]}, {"string", "integer", "number", "null"}),
        ({"enum": ["a", "b"]}, {"string"}),
        ({"const": True}, {"boolean"}),
        ({"anyOf": [{"type": "string"}, {"items": {}}]}, {"string", "array"}),
        ({"oneOf": [{"type": "number"}, {"enum": [None]}]}, {"number", "null"}),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}]}, {"integer"}),
        ({"allOf": [{"description": "anything"}, {"type": "array"}]}, {"array"}),
        ({"properties": {"a": {}}}, {"object"}),
        ({"items": {"type": "string"}}, {"array"}),
        ({"pattern": "a+"}, {"string"}),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "boolean"}}}, {"boolean"}),
        ({"$ref": "#/$defs/no"}, ALL),
        ({"$ref": "#"}, ALL),
        ({"$ref": "https://example.com/x"}, ALL),
        ({"anyOf": [{"$ref": "#"}, {"type": "string"}]}, ALL),
        ({"type": "any"}, ALL),
        ({"type": ["string", "strange"]}, {"string"}),
        ({"type": 3, "enum": [], "anyOf": 5, "allOf": None}, ALL),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, ALL),
        ({}, ALL),
        (True, ALL),
        (None, ALL),
    ],
)
def test_types_of_a_schema(schema: Any, types: set[str]) -> None:
    assert types_of(schema) == types


def test_a_reference_starts_from_the_root() -> None:
    root = {"$defs": {"day": {"enum": ["Mon", "Tue"]}}, "properties": {"d": {"$ref": "#/$defs/day"}}}
    assert types_of(root["properties"]["d"], root) == {"string"}


def test_alternatives_that_refer_to_one_another_are_followed_once() -> None:
    root = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"} for _ in range(40)] + [{"type": "null"}]}}}
    started = time.monotonic()
    assert types_of({"$ref": "#/$defs/a"}, root) == ALL  # it may be anything that it may be
    root = {"$defs": {f"a{at}": {"oneOf": [{"$ref": f"#/$defs/a{at + 1}"} for _ in range(40)]} for at in range(5)}}
    root["$defs"]["a5"] = {"type": "integer"}
    assert types_of({"$ref": "#/$defs/a0"}, root) == {"integer"}
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("1e400", {"number", "string"}, "1e400"),
        ("NaN", {"number", "string"}, "NaN"),
        (" 12 ", {"number"}, 12),
        ("12", {"boolean"}, "12"),
        ("FALSE", {"boolean"}, False),
        ("None", {"null", "string"}, None),
        ("{1, 2}", {"array"}, "{1, 2}"),
        ("(1, 2)", {"array"}, (1, 2)),
        ("[" * 100_000, {"array"}, "[" * 100_000),
        ("-" * 100_000 + "1", {"integer"}, "-" * 100_000 + "1"),
    ],
)
def test_values_of_text(text: str, types: set[str], value: object) -> None:
    assert value_of(text, frozenset(types)) == value
