"""What the front asks of the grammar helper (`grammar.helper`) and what comes back.

On the wire: eight bytes of length, then one msgpack message.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from multimodal_gen.llm.vocabulary import Vocabulary
from multimodal_gen.text import GrammarKind

HEADER = struct.Struct("<Q")
MAX_MESSAGE_BYTES = 64 << 20


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """The first order: everything is compiled for this vocabulary."""

    vocabulary: Vocabulary


class Compile(msgspec.Struct, frozen=True, tag=True):
    """One grammar; answered by `Compiled` or `Refused` with the same id."""

    id: int
    kind: GrammarKind
    source: str
    """a schema is settled already"""
    limit_s: float
    """from when its turn comes"""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The library is loaded."""


class Compiled(msgspec.Struct, frozen=True, tag=True):
    id: int
    data: bytes


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Nothing came of it."""

    id: int
    reason: Literal["wrong", "slow", "large", "died"]
    """wrong: the grammar is at fault, as `words` say; slow and large: it needs more than it may have"""
    words: str = ""


Order = Prepare | Compile
Answer = Ready | Compiled | Refused

_encoder = msgspec.msgpack.Encoder()
_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def pack(message: Order | Answer) -> bytes:
    """The message with its length before it."""
    payload = _encoder.encode(message)
    return HEADER.pack(len(payload)) + payload


def read_order(payload: bytes) -> Order:
    """Raises: msgspec.DecodeError."""
    return _orders.decode(payload)


def read_answer(payload: bytes) -> Answer:
    """Raises: msgspec.DecodeError."""
    return _answers.decode(payload)
