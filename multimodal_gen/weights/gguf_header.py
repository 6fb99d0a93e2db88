"""What stands before the tensors of a GGUF file (format 2 and 3), read within bounds. No torch, no numpy here.

Every length that the file claims is compared with what is left of the file before anything is read or made for it, so
a damaged file costs no memory and nothing is read beyond its end.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from multimodal_gen.errors import CorruptModel
from multimodal_gen.weights.header import TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 << 20  # the largest vocabularies take a fifth of it
MAX_VALUES = 1 << 22  # of an array; the largest vocabularies have a tenth of it
MAX_NAME = 65_535  # bytes of a key
MAX_DIMS = 4
MAX_DEPTH = 2  # arrays in arrays
MAX_ALIGNMENT = 1 << 16
MAX_NUMBER = (1 << 63) - 1
LEAST_PAIR, LEAST_TENSOR = 13, 24  # bytes of the shortest key with its value, of the shortest entry of a tensor


class Quantization(NamedTuple):
    """How a type of tensor is stored: blocks of neighbours within a row."""

    name: str
    block: int  # numbers of a block
    bytes: int  # of a block


TYPES = {
    0: Quantization("F32", 1, 4),
    1: Quantization("F16", 1, 2),
    2: Quantization("Q4_0", 32, 18),
    3: Quantization("Q4_1", 32, 20),
    6: Quantization("Q5_0", 32, 22),
    7: Quantization("Q5_1", 32, 24),
    8: Quantization("Q8_0", 32, 34),
    10: Quantization("Q2_K", 256, 84),
    11: Quantization("Q3_K", 256, 110),
    12: Quantization("Q4_K", 256, 144),
    13: Quantization("Q5_K", 256, 176),
    14: Quantization("Q6_K", 256, 210),
    20: Quantization("IQ4_NL", 32, 18),
    23: Quantization("IQ4_XS", 256, 136),
    30: Quantization("BF16", 1, 2),
}
BY_NAME = {kind.name: kind for kind in TYPES.values()}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GgufHeader(NamedTuple):
    """A file's metadata and the places of its tensors."""

    metadata: dict[str, Any]  # numbers, text, booleans, and lists of them
    tensors: dict[str, TensorInfo]  # in file order; shapes have rows first, the file has them last
    data_start: int  # byte of the file at which the tensors begin


def read_gguf(path: Path, shown: str) -> GgufHeader:
    """Read and check a header.

    `shown` is the file's name in error messages. Raises: CorruptModel for what is no GGUF file, is cut or damaged, has
    tensors of a type that is not read here, or that lie outside the file or on one another.
    """
    try:
        size = path.stat().st_size
        with path.open("rb", buffering=1 << 20) as file:
            return _Cursor(file, size, shown).header()
    except OSError as error:
        raise CorruptModel(f"{shown} cannot be read: {error.strerror}.") from None


class _Cursor:
    """Reads forwards and never beyond the end."""

    def __init__(self, file: BinaryIO, size: int, shown: str) -> None:
        self._read, self._size, self._shown = file.read, size, shown
        self._left = min(size, MAX_HEADER_BYTES)

    def header(self) -> GgufHeader:
        if self._size < 24 or self._take(4, "the magic number") != MAGIC:
            raise self._damaged("it does not begin with GGUF")
        version = self._number("I", "the version")
        if version not in VERSIONS:
            raise CorruptModel(
                f"{self._shown}: GGUF version {version} is not read here, only {VERSIONS}. Convert it anew."
            )
        tensors = self._count("tensors", LEAST_TENSOR)
        pairs = self._count("keys", LEAST_PAIR)
        metadata = self._metadata(pairs)
        entries = self._entries(tensors)
        start = self._aligned(metadata)
        return GgufHeader(metadata, self._placed(entries, start), start)

    def _metadata(self, pairs: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text("a key", MAX_NAME)
            if key in found:
                raise self._damaged(f"the key {key[:80]!r} is doubled")
            found[key] = self._value(self._number("I", key), key, 0)
        return found

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], key)
        if kind == _STRING:
            return self._text(key)
        if kind != _ARRAY or depth == MAX_DEPTH:
            raise self._damaged(f"{key[:80]!r} has a value of unknown type {kind}, or arrays too deep in one another")
        item = self._number("I", key)
        least = struct.calcsize(_SCALARS[item]) if item in _SCALARS else 8
        count = self._count(f"values of {key[:80]!r}", least)
        if count > MAX_VALUES:
            raise self._damaged(f"{key[:80]!r} has {count:,} values")
        if item in _SCALARS:
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self._take(count * least, key)))
        if item == _STRING:
            return [self._text(key) for _ in range(count)]
        return [self._value(item, key, depth + 1) for _ in range(count)]

    def _entries(self, count: int) -> dict[str, tuple[Quantization, tuple[int, ...], int]]:
        found: dict[str, tuple[Quantization, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self._text("a tensor's name", MAX_NAME)
            if name in found:
                raise self._damaged(f"the tensor {name[:80]!r} is doubled")
            dims = self._number("I", name)
            if not 1 <= dims <= MAX_DIMS:
                raise self._damaged(f"the tensor {name[:80]!r} has {dims} dimensions")
            shape = struct.unpack(f"<{dims}Q", self._take(8 * dims, name))
            kind, begin = self._number("I", name), self._number("Q", name)
            if kind not in TYPES:
                known = ", ".join(BY_NAME)
                raise CorruptModel(
                    f"{self._shown}: the tensor {name[:80]!r} has type {kind}, which is not read here. Use a file of "
                    f"these types: {known}."
                )
            found[name] = (TYPES[kind], shape[::-1], begin)
        return found

    def _aligned(self, metadata: dict[str, Any]) -> int:
        """Where the tensors begin."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {str(alignment)[:40]}, which is no power of two")
        read = min(self._size, MAX_HEADER_BYTES) - self._left
        return -(-read // alignment) * alignment

    def _placed(
        self, entries: dict[str, tuple[Quantization, tuple[int, ...], int]], start: int
    ) -> dict[str, TensorInfo]:
        available = max(0, self._size - start)
        found = {}
        for name, (kind, shape, begin) in sorted(entries.items(), key=lambda item: item[1][2]):
            count = math.prod(shape)
            if not 0 < count <= MAX_NUMBER or shape[-1] % kind.block:
                raise self._damaged(f"the tensor {name[:80]!r} cannot be {kind.name} of shape {list(shape)}")
            end = begin + count // kind.block * kind.bytes
            if end > available:
                raise CorruptModel(
                    f"{self._shown} is truncated: the tensor {name[:80]!r} ends at byte {start + end:,} and the file "
                    f"has {self._size:,}. Download it again."
                )
            found[name] = TensorInfo(kind.name, shape, begin, end)
        ends = [info.end for info in found.values()]
        for (name, info), before in zip(list(found.items())[1:], ends, strict=False):
            if info.begin < before:
                raise self._damaged(f"the bytes of the tensor {name[:80]!r} overlap another's")
        return found

    # --- pieces ---------------------------------------------------------------------------------------------------

    def _take(self, count: int, what: str) -> bytes:
        if count > self._left or len(data := self._read(count)) < count:
            raise self._damaged(f"{what[:80]!r} does not fit into it")
        self._left -= count
        return data

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code), what))[0]

    def _count(self, what: str, least: int) -> int:
        """A number of things that take `least` bytes each, at least."""
        count: int = self._number("Q", what)
        if count * least > self._left:
            raise self._damaged(f"it announces {count:,} {what}")
        return count

    def _text(self, what: str, limit: int = MAX_HEADER_BYTES) -> str:
        length = int.from_bytes(self._take(8, what), "little")
        if length > limit:
            raise self._damaged(f"{what[:80]!r} has a text of {length:,} bytes")
        # Vocabularies of bytes hold pieces of characters.
        return self._take(length, what).decode("utf-8", "surrogateescape")

    def _damaged(self, why: str) -> CorruptModel:
        return CorruptModel(
            f"{self._shown} is damaged or no GGUF file: {why}; it has {self._size:,} bytes. Download it again."
        )
