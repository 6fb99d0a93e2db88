"""The header of a safetensors file, checked before any loader maps the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from multimodal_gen.errors import CorruptModel

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
LENGTH_BYTES = 8
MAX_DIMS = 16
MAX_NUMBER = (1 << 63) - 1

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class TensorInfo(NamedTuple):
    """One tensor of a file; `begin` and `end` are bytes counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Header(NamedTuple):
    """What stands before the tensors of a file."""

    tensors: dict[str, TensorInfo]  # in file order
    metadata: dict[str, str]  # free text that the writer added
    data_start: int  # byte of the file at which the tensors begin


def read_header(path: Path, shown: str) -> dict[str, TensorInfo]:
    """All tensors of a safetensors file, in file order.

    `shown` is the file's name in error messages. Raises CorruptModel for a header that is cut, too long or no JSON, an
    unknown dtype, and tensors that overlap, leave gaps or do not end where the file ends.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _length(file.read(LENGTH_BYTES), size, MAX_HEADER_BYTES, shown)
            raw = file.read(length)
    except OSError as error:
        raise CorruptModel(f"{shown} cannot be read: {error.strerror}.") from None
    return _header(raw, size, shown).tensors


def parse_header(data: memoryview, shown: str, max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """The header of a whole file in memory, checked as `read_header` does; at most `max_bytes` long."""
    length = _length(data[:LENGTH_BYTES], len(data), max_bytes, shown)
    return _header(bytes(data[LENGTH_BYTES : LENGTH_BYTES + length]), len(data), shown)


def _length(first: bytes | memoryview, size: int, limit: int, shown: str) -> int:
    length = int.from_bytes(first, "little")
    if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, limit):
        raise CorruptModel(
            f"{shown} is damaged or no safetensors file: it announces a header of {length:,} bytes and has "
            f"{size:,} bytes in all. Download it again."
        )
    return length


def _header(raw: bytes, size: int, shown: str) -> Header:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise CorruptModel(f"{shown} is damaged: its header is not valid JSON. Download it again.") from None
    if not isinstance(content, dict):
        raise CorruptModel(f"{shown} is damaged: its header is not a JSON object. Download it again.")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptModel(f"{shown} is damaged: its metadata must map names to text. Download it again.")
    found = {name: _tensor(name, entry, shown) for name, entry in content.items()}
    tensors = dict(sorted(found.items(), key=lambda item: item[1][2:]))
    start = LENGTH_BYTES + len(raw)
    _check_layout(tensors, size - start, shown)
    return Header(tensors, metadata, start)


def _tensor(name: str, entry: Any, shown: str) -> TensorInfo:
    where = f"{shown}, tensor {name[:80]!r}"
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CorruptModel(f"{where}: the entry must have dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CorruptModel(f"{where}: unknown dtype {str(dtype)[:40]!r}.")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise CorruptModel(f"{where}: shape and data_offsets must be lists of whole numbers.")
    if len(shape) > MAX_DIMS or any(number > MAX_NUMBER for number in (*shape, *offsets)):
        raise CorruptModel(f"{where}: no tensor has more than {MAX_DIMS} dimensions or numbers of 64 bits.")
    tensor = TensorInfo(dtype, tuple(shape), *offsets)
    if tensor.elements * _BITS[dtype] != (tensor.end - tensor.begin) * 8:
        raise CorruptModel(
            f"{where}: {dtype} of shape {list(tensor.shape)} needs {tensor.elements * _BITS[dtype] // 8:,} bytes, its "
            f"offsets span {tensor.end - tensor.begin:,}."
        )
    return tensor


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(tensors: dict[str, TensorInfo], available: int, shown: str) -> None:
    end = 0
    for name, tensor in tensors.items():
        if tensor.begin != end:
            raise CorruptModel(f"{shown}, tensor {name[:80]!r}: its bytes overlap another tensor's or leave a gap.")
        end = tensor.end
    if end != available:
        what = "truncated" if end > available else "longer than its header says"
        raise CorruptModel(
            f"{shown} is {what}: {end:,} bytes of tensors expected, {available:,} found. Download it again."
        )
