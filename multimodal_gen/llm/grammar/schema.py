"""JSON schemas as the grammar library takes them, or a refusal that names what cannot be kept.

The library ignores what it does not know. Here nothing is ignored that says what is valid: every answer that a schema
lets through is valid by it. What narrows a schema without changing what is valid by its own words is done to it: no
properties beside those that are named, the types that keywords speak of.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 64

# They say what is valid, and no grammar here can keep them.
REFUSED = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas",
    "dependencies", "unevaluatedItems", "$dynamicRef", "$recursiveRef", "$anchor", "$dynamicAnchor",
)  # fmt: skip
COMBINERS = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
# Keyword → the type that it speaks of.
SPEAKS_OF = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), "number"),
    **dict.fromkeys(("minLength", "maxLength", "pattern"), "string"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems", "uniqueItems"), "array"),
    **dict.fromkeys(("properties", "patternProperties", "additionalProperties", "unevaluatedProperties"), "object"),
    **dict.fromkeys(("propertyNames", "required", "minProperties", "maxProperties"), "object"),
}
LISTS, TABLES = ("anyOf", "oneOf", "allOf", "prefixItems"), ("properties", "patternProperties", "$defs", "definitions")
SINGLE = ("items", "additionalProperties", "propertyNames")

_IS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: _number(value) and (isinstance(value, int) or value.is_integer()),
    "number": lambda value: _number(value),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


class SchemaRefused(Exception):
    """The text says where in the schema, what, and why."""


def settle(source: str) -> str:
    """The schema for the library. Raises: SchemaRefused."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError):
        raise SchemaRefused("it is no JSON, or nested too deep") from None
    return json.dumps(_settle(schema, "#", 0))


def _settle(schema: Any, at: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise SchemaRefused(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise SchemaRefused(f"{_shown(at)} must be an object, true or false")
    for keyword in REFUSED:
        if keyword in schema:
            raise SchemaRefused(f"{_shown(at)} has {keyword!r}, which cannot be enforced while an answer is written")
    own = _tuples(dict(schema))
    _check_type(own, at)
    for keyword in [keyword for keyword in own if keyword in (*LISTS, *TABLES, *SINGLE)]:
        inner = f"{at}/{keyword}"
        if keyword in LISTS:
            own[keyword] = [_settle(item, f"{inner}/{i}", depth + 1) for i, item in enumerate(_list(own, keyword, at))]
        elif keyword in TABLES:
            table = _table(own, keyword, at)
            own[keyword] = {name: _settle(item, f"{inner}/{name}", depth + 1) for name, item in table.items()}
        else:
            own[keyword] = _settle(own[keyword], inner, depth + 1)
    if any(keyword in own for keyword in COMBINERS):
        return _combined(own, at)
    return _plain(own, at)


def _combined(own: dict[str, Any], at: str) -> dict[str, Any]:
    """One of $ref, anyOf, oneOf, allOf, enum, const; beside it, a type at most."""
    found = [keyword for keyword in COMBINERS if keyword in own]
    beside = [keyword for keyword in own if keyword in SPEAKS_OF]
    if len(found) > 1 or beside:
        both = " and ".join(map(repr, (found + beside)[:2]))
        raise SchemaRefused(f"{_shown(at)} has {both} side by side, which cannot be enforced; say it in one of them")
    (keyword,) = found
    if keyword == "$ref":
        _check_reference(own, at)
    if keyword in ("enum", "const"):
        return _values(own, keyword, at)
    if keyword == "allOf" and len(own[keyword]) > 1:
        raise SchemaRefused(
            f"{_shown(at)} has 'allOf' with several schemas, which cannot be enforced; join them into one"
        )
    if "type" in own and keyword == "$ref":
        raise SchemaRefused(f"{_shown(at)} has '$ref' and 'type' side by side; say the type where it refers to")
    if "type" in own:
        kind = own.pop("type")
        own[keyword] = [_typed(branch, kind, at) for branch in own[keyword]]
    return own


def _typed(branch: Any, kind: Any, at: str) -> Any:
    """A branch of a schema that names the type of all."""
    if isinstance(branch, bool):
        return {"type": kind} if branch else branch
    if branch.get("type", kind) != kind or any(keyword in branch for keyword in COMBINERS):
        raise SchemaRefused(f"{_shown(at)} has a type beside branches with types of their own; leave it out")
    return _plain({**branch, "type": kind}, at)


def _values(own: dict[str, Any], keyword: str, at: str) -> dict[str, Any]:
    values = [own[keyword]] if keyword == "const" else _list(own, keyword, at)
    kinds = own.pop("type", None)
    if kinds is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        values = [value for value in values if any(_IS[kind](value) for kind in kinds)]
    if not values:
        raise SchemaRefused(f"{_shown(at)} has no value that is valid")
    del own[keyword]
    return {**own, "enum": values}


def _plain(own: dict[str, Any], at: str) -> dict[str, Any]:
    """A schema of one type, or of several."""
    kinds = sorted({SPEAKS_OF[keyword] for keyword in own if keyword in SPEAKS_OF})
    if "type" not in own and kinds:
        if len(kinds) > 1:
            raise SchemaRefused(f"{_shown(at)} needs a 'type': it speaks of {' and '.join(kinds)}")
        own["type"] = kinds[0]
    if own.get("uniqueItems") is True:
        raise SchemaRefused(f"{_shown(at)} has 'uniqueItems', which cannot be enforced while an answer is written")
    own.pop("uniqueItems", None)
    if "pattern" in own and ("minLength" in own or "maxLength" in own):
        raise SchemaRefused(
            f"{_shown(at)} has a 'pattern' and a length; say the length in the pattern, which can be enforced"
        )
    if "multipleOf" in own and own["type"] != "integer":
        raise SchemaRefused(f"{_shown(at)} has 'multipleOf', which can be enforced for integers only")
    if "object" in kinds:
        _object(own, at)
    return own


def _object(own: dict[str, Any], at: str) -> None:
    properties = own.get("properties", {})
    beyond = own.pop("unevaluatedProperties", None)
    if beyond is not None:
        own.setdefault("additionalProperties", _settle(beyond, f"{at}/unevaluatedProperties", 0))
    if "propertyNames" in own and (properties or "patternProperties" in own):
        raise SchemaRefused(f"{_shown(at)} has 'propertyNames' beside properties, which cannot both be enforced")
    others = own.get("additionalProperties", True)
    named = own.get("required", [])
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise SchemaRefused(f"{_shown(at)}/required must be a list of names")
    missing = {name: others for name in named if name not in properties}
    if missing and (others is False or "patternProperties" in own):
        raise SchemaRefused(f"{_shown(at)} requires {next(iter(missing))[:40]!r}, which its properties do not have")
    if properties and "additionalProperties" not in own and "minProperties" not in own:
        own["additionalProperties"] = False
    if properties or missing:
        own["properties"] = {**properties, **missing}


def _tuples(own: dict[str, Any]) -> dict[str, Any]:
    """Older drafts' lists of items as prefixItems."""
    if isinstance(own.get("items"), list):
        own["prefixItems"] = own.pop("items")
        if "additionalItems" in own:
            own["items"] = own.pop("additionalItems")
    return own


def _check_reference(own: dict[str, Any], at: str) -> None:
    target = own["$ref"]
    if not isinstance(target, str) or (target != "#" and not target.startswith("#/")):
        raise SchemaRefused(f"{_shown(at)} refers to {str(target)[:60]!r}; only places in itself (#/…) can be meant")


def _check_type(own: dict[str, Any], at: str) -> None:
    kinds = own.get("type", "null")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    wrong = [kind for kind in kinds if not isinstance(kind, str) or kind not in _IS]
    if wrong or not kinds:
        got = f", got {str(wrong[0])[:40]!a}" if wrong else ""
        raise SchemaRefused(f"{_shown(at)}/type must be one of {', '.join(_IS)}, or a list of them{got}")


def _list(own: dict[str, Any], keyword: str, at: str) -> list[Any]:
    value = own[keyword]
    if not isinstance(value, list) or not value:
        raise SchemaRefused(f"{_shown(at)}/{keyword} must be a list that is not empty")
    return value


def _table(own: dict[str, Any], keyword: str, at: str) -> dict[str, Any]:
    value = own[keyword]
    if not isinstance(value, dict):
        raise SchemaRefused(f"{_shown(at)}/{keyword} must be an object")
    return value


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(at: str) -> str:
    return at if len(at) <= 120 else f"{at[:60]}…{at[-59:]}"
