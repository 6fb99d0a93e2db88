"""The header X-Routing-Key: what is taken, and that everything else is refused before it is stored or shown."""

from __future__ import annotations

import pytest

from multimodal_gen.errors import InvalidValue
from multimodal_gen.server.security import routing_key
from multimodal_gen.text import MAX_ROUTING_KEY

pytestmark = [pytest.mark.unit]


def headers(*values: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"localhost"), *((b"x-routing-key", value) for value in values)]


@pytest.mark.parametrize(
    "value", ["a", "tenant-7/user_3", "A.b:c/d@e+f=g~h", "k" * MAX_ROUTING_KEY], ids=lambda value: value[:12]
)
def test_keys_of_plain_letters_are_taken_as_they_are(value: str) -> None:
    assert routing_key(headers(value.encode())) == value


def test_no_header_is_no_key() -> None:
    assert routing_key(headers()) is None


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b" ",
        b"a b",
        b"a\tb",
        b"a\x00b",
        b"a\nb",
        b"a\n",
        b"a,b",
        b'"a"',
        b"{a}",
        b"a\\b",
        b"a%20b",
        b"\xff\xfe",
        "ключ".encode(),
        "\u0661".encode(),  # a digit, though not one of ours
        b"k" * (MAX_ROUTING_KEY + 1),
        b"k" * 100_000,
    ],
    ids=lambda value: repr(value[:12]),
)
def test_anything_else_is_refused_without_being_repeated(value: bytes) -> None:
    with pytest.raises(InvalidValue) as caught:
        routing_key(headers(value))
    assert caught.value.param == "x-routing-key"
    assert str(MAX_ROUTING_KEY) in caught.value.message
    assert len(caught.value.message) < 200


def test_two_keys_are_none() -> None:
    with pytest.raises(InvalidValue):
        routing_key(headers(b"a", b"a"))
