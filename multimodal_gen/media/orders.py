"""What the front asks of a helper process (`media.helper`) and what comes back. On the wire: eight bytes of length, one
msgpack message, then the payload: the picture's bytes, or the frames one after another."""

from __future__ import annotations

import struct

import msgspec

from multimodal_gen.media.recipe import VideoFormat
from multimodal_gen.messages import ErrorInfo

HEADER = struct.Struct("<Q")


class ReadPicture(msgspec.Struct, frozen=True, tag=True):
    """The payload becomes a PNG, which is the payload of the answer."""

    bytes: int
    """of the payload"""
    max_bytes: int


class WriteVideo(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The payload's frames become the files `video`, `thumbnail` and `spritesheet`, each whole or not there."""

    video: str
    """absolute path, as the others"""
    thumbnail: str
    spritesheet: str
    shape: tuple[int, int, int, int]
    """frames, height, width, 3"""
    fps: int
    output_format: VideoFormat
    recipe: str
    """JSON"""


class Done(msgspec.Struct, frozen=True, tag=True):
    """`bytes` of payload follow."""

    bytes: int = 0


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The order could not be carried out."""

    error: ErrorInfo


Order = ReadPicture | WriteVideo
Answer = Done | Refused

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
