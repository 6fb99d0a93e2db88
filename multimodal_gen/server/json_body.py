"""A JSON object from raw bytes, stricter than `json.loads`: whatever is ambiguous or hostile is one plain error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from starlette.requests import Request

from multimodal_gen.errors import InvalidJson, UnknownParameter, did_you_mean

MAX_DEPTH = 32
MAX_VALUES = 10_000
"""values in all lists and objects: the event loop waits while a body is parsed and checked, about 5 µs for each"""


def parse_object(body: bytes, most: int = MAX_VALUES) -> dict[str, Any]:
    """The object in `body` (UTF-8), of at most `most` values.

    Raises: InvalidJson for anything else: bad UTF-8, lone surrogates, NaN or Infinity, duplicate keys, trailing data,
    nesting deeper than `MAX_DEPTH`, too many values, numbers of thousands of digits.
    """
    if not body.strip():
        raise InvalidJson('The request has no body; send a JSON object such as {"prompt": "a teapot"}.')
    _check_amount(body, most)
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except InvalidJson:
        raise
    except UnicodeDecodeError as error:
        raise InvalidJson(f"The body is not UTF-8 (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise InvalidJson(f"The body is not valid JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # Python refuses integers of more than 4,300 digits
        raise InvalidJson("The body holds a number with thousands of digits.") from None
    if not isinstance(value, dict):
        raise InvalidJson(f"The body must be a JSON object, not {type(value).__name__}.")
    check_tree(value)
    return value


def _check_amount(body: bytes, most: int) -> None:
    """Count what is to be parsed: brackets and commas outside of strings, which are free to hold any number of them.

    Up to the first mistake, where the parser stops, both see the same strings.
    """
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    quotes = plain.count(b'"')
    outside = b"".join(plain.split(b'"')[::2]) if quotes <= 4 * most else plain
    if quotes > 4 * most or sum(outside.count(mark) for mark in (b"[", b"{", b",")) > most:
        raise InvalidJson(f"The body holds more than {most:,} values.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise InvalidJson(f"The key {name[:64]!a} appears twice; which value is meant?")
        seen.add(name)
    return found


async def read_fields(request: Request, known: Sequence[str]) -> dict[str, Any]:
    """The JSON object of a request; an empty body counts as {}. `null` is the same as leaving a field out.

    Raises: InvalidJson, UnknownParameter.
    """
    raw = await request.body()
    body = parse_object(raw) if raw.strip() else {}
    for name in body:
        if name not in known:
            raise UnknownParameter(f"Unknown field {name[:64]!a}.{did_you_mean(name[:64], known)}", param=name[:64])
    return {name: value for name, value in body.items() if value is not None}


def _constant(name: str) -> NoReturn:
    raise InvalidJson(f"{name} is not a JSON number.")


def check_tree(root: dict[str, Any]) -> None:
    """Depth and text of a parsed value, without recursion. Raises: InvalidJson."""
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for container in level:
            if isinstance(container, dict):
                _check_text(*container)
                children = list(container.values())
            else:
                children = container
            _check_text(*(child for child in children if isinstance(child, str)))
            deeper += [child for child in children if isinstance(child, (dict, list))]
        level = deeper
        if not level:
            return
    raise _too_deep()


def _check_text(*texts: str) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidJson("The body holds a lone surrogate, which is not valid Unicode text.") from None


def _too_deep() -> InvalidJson:
    return InvalidJson(f"The body is nested deeper than {MAX_DEPTH} levels.")
