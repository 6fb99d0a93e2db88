"""The types that a JSON schema allows for a value, and a value of one of them from the text that a model wrote.

For formats that write arguments as bare text (GLM's XML): `<arg_value>7</arg_value>` is the number 7 or the text "7",
and only the tool's schema knows.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

_SURROGATE = re.compile("[\ud800-\udfff]")
ALL = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
MAX_DEPTH = 16
"""of references and alternatives inside one another"""

# Keyword → the type that it says something about; looked at where a schema names no type.
_TELLING = {
    "properties": "object", "required": "object", "additionalProperties": "object", "patternProperties": "object",
    "items": "array", "prefixItems": "array", "minItems": "array", "maxItems": "array",
    "pattern": "string", "minLength": "string", "maxLength": "string", "format": "string",
    "minimum": "number", "maximum": "number", "multipleOf": "number",
}  # fmt: skip


def types_of(schema: Any, root: Any = None) -> frozenset[str]:
    """Names of JSON types that a value of `schema` may have; all of them where it says nothing that we understand.

    `root` is the schema that references (`#/$defs/…`) start from.
    """
    return _types_of(schema, schema if root is None else root, 0, {})


def _types_of(schema: Any, root: Any, depth: int, known: dict[int, frozenset[str]]) -> frozenset[str]:
    """`known`: what each schema has come to, by its identity; alternatives that share references would else be followed
    once for every way that leads to them."""
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return ALL
    if id(schema) not in known:
        known[id(schema)] = ALL  # what a schema says of itself is nothing new
        known[id(schema)] = _worked_out(schema, root, depth + 1, known)
    return known[id(schema)]


def _worked_out(schema: dict[str, Any], root: Any, depth: int, known: dict[int, frozenset[str]]) -> frozenset[str]:
    named = _named(schema.get("type"))
    for values in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
        if isinstance(values, list) and values:
            named &= frozenset(map(type_of, values)) | ({"number"} if any(type(v) is int for v in values) else set())
    if "$ref" in schema:
        named &= _types_of(_followed(schema["$ref"], root), root, depth, known)
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list) and schema[word]:
            named &= frozenset[str]().union(*(_types_of(part, root, depth, known) for part in schema[word]))
    if isinstance(schema.get("allOf"), list):
        for part in schema["allOf"]:
            named &= _types_of(part, root, depth, known)
    if named == ALL:
        told = {_TELLING[word] for word in schema if word in _TELLING}
        return frozenset(told) if len(told) == 1 else ALL
    return named or ALL


def type_of(value: object) -> str:
    """The JSON type of a value."""
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (dict, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "array")


def value_of(text: str, types: frozenset[str]) -> Any:
    """The value that `text` stands for: JSON first, then Python's spelling, else the text itself: nothing is lost."""
    if types == {"string"}:
        return text
    for read in (_json, _python, _word):
        try:
            value = read(text.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        kind = type_of(value)
        if kind in types or (kind == "integer" and "number" in types):
            return value
        if "integer" in types and isinstance(value, float) and value.is_integer():
            return int(value)
    return text


def dumped(value: object) -> str:
    """JSON as models write it. Halves of surrogate pairs, which no UTF-8 can say, stay escaped."""
    return escaped(json.dumps(value, ensure_ascii=False))


def escaped(text: str) -> str:
    """JSON text that UTF-8 can say."""
    return _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def _named(names: object) -> frozenset[str]:
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list):
        return ALL
    return (frozenset(name for name in names if isinstance(name, str)) & ALL) or ALL


def _followed(reference: object, root: Any) -> Any:
    """The schema that a local reference names; None where there is none."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    place = root
    for step in _steps(reference):
        if isinstance(place, dict) and step in place:
            place = place[step]
        else:
            return None
    return place


def _steps(reference: str) -> Iterable[str]:
    return (step.replace("~1", "/").replace("~0", "~") for step in reference.split("/")[1:])


_WORDS = {"true": True, "false": False, "null": None, "none": None}


def _json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _python(text: str) -> Any:
    value = ast.literal_eval(text)
    json.dumps(value, allow_nan=False)  # sets, bytes and complex numbers are no JSON
    return value


def _word(text: str) -> Any:
    word = text.lower()
    return _WORDS[word] if word in _WORDS else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)
