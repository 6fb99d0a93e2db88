"""How tokens are spelled in a tokenizer's files, and what bytes of a text they stand for."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache, cached_property
from typing import Any, Literal

import msgspec

Spelling = Literal["byte-level", "sentencepiece", "plain"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary(msgspec.Struct, frozen=True, dict=True):
    """All tokens of a model, as the bytes that they add to a text. Made by `Tokenizer.vocabulary`."""

    tokens: tuple[bytes, ...]
    """by id; empty for special tokens and ids without a token"""
    eos_ids: tuple[int, ...]

    @cached_property
    def digest(self) -> str:
        """Names it in the digests of grammars."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()


def spelling_of(tokenizer: str) -> Spelling:
    """How the tokenizer of this JSON spells bytes and spaces."""
    content = json.loads(tokenizer)
    kinds = {*_kinds(content.get("decoder")), *_kinds(content.get("pre_tokenizer"))}
    if "ByteLevel" in kinds:
        return "byte-level"
    return "sentencepiece" if kinds & {"Metaspace", "ByteFallback", "Replace"} else "plain"


def _kinds(part: Any) -> list[str]:
    """Types of a decoder and those in it."""
    if not isinstance(part, dict):
        return []
    inner = [*part.get("decoders", []), *part.get("pretokenizers", [])]
    return [str(part.get("type")), *(kind for child in inner for kind in _kinds(child))]


def spell(token: str, spelling: Spelling) -> bytes:
    """The bytes that a token of the vocabulary stands for."""
    if spelling == "byte-level":
        known = byte_characters()
        return bytes(known[c] for c in token) if all(c in known for c in token) else token.encode()
    if spelling == "plain":
        return token.encode()
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


@cache
def byte_characters() -> dict[str, int]:
    """Character → byte of byte-level BPE (GPT-2): printable bytes stand for themselves, the others follow from
    U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
