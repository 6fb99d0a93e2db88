"""An adapter file in memory: read once, checked, hashed; its tensors are views of the bytes read.

The bytes are read rather than mapped: a file that is replaced or cut while it is in use must not change an adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.errors import AdapterLimit, CorruptAdapter, CorruptModel
from multimodal_gen.lora.sources import CONFIG, FOLDER_FILES, locate, unsafe
from multimodal_gen.weights.header import TensorInfo, parse_header

MAX_HEADER_BYTES = 16 << 20
MAX_CONFIG_BYTES = 1 << 20
MAX_TENSORS = 100_000
MAX_KEY_CHARS = 512
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save's zip; bare pickles

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
}


@dataclass(frozen=True)
class AdapterFile:
    """Filled by `read_adapter`."""

    name: str  # of the file, for messages
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]  # of the safetensors header
    config: Mapping[str, Any]  # adapter_config.json beside it; {} where there is none
    sha256: str  # of the file, hexadecimal
    digest: str  # of file and config
    size: int  # bytes


def read_adapter(path: Path, max_bytes: int) -> AdapterFile:
    """Read one safetensors file, and the `adapter_config.json` beside it.

    Raises: AdapterLimit above `max_bytes`; UnsafeFormat for a pickle, whatever its name; CorruptAdapter for a broken
    header, an unreadable file, and numbers that are not finite.
    """
    path = locate(path)
    name = path.name
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise AdapterLimit(
                f"{name} has {size / 2**20:,.0f} MiB and {max_bytes / 2**20:,.0f} MiB are left for adapters "
                "(--max-lora-mb); unload others, or raise the limit."
            )
        data = bytearray(size)
        with path.open("rb") as file:
            if file.readinto(data) != size or file.read(1):
                raise CorruptAdapter(f"{name} changed while it was read; load it again.")
    except OSError as error:
        raise CorruptAdapter(f"{name} cannot be read: {error.strerror}.") from None
    tensors, metadata = _tensors(data, name)
    raw_config, config = _read_config(config_of(path))
    digest = hashlib.sha256(data)
    sha256 = digest.hexdigest()
    digest.update(raw_config)
    return AdapterFile(name, tensors, metadata, config, sha256, digest.hexdigest(), size)


def _tensors(data: bytearray, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        header = parse_header(memoryview(data), name, MAX_HEADER_BYTES)
    except CorruptModel as error:
        # Only now: the first bytes of a sound header's length can be those of a pickle.
        if any(data.startswith(start) for start in PICKLE_STARTS):
            raise unsafe(name) from None
        raise CorruptAdapter(error.message) from None
    if not 0 < len(header.tensors) <= MAX_TENSORS:
        raise CorruptAdapter(f"{name} holds {len(header.tensors):,} tensors; 1 to {MAX_TENSORS:,} are possible.")
    odd = next((key for key in header.tensors if len(key) > MAX_KEY_CHARS or not key.isprintable()), None)
    if odd is not None:
        raise CorruptAdapter(
            f"{name} names a tensor {odd[:40]!a}: names are up to {MAX_KEY_CHARS} printable characters."
        )
    found = {key: _tensor(data, header.data_start, key, info, name) for key, info in header.tensors.items()}
    return found, header.metadata


def _tensor(data: bytearray, start: int, key: str, info: TensorInfo, name: str) -> Tensor:
    dtype = _DTYPES.get(info.dtype)
    if dtype is None:
        raise CorruptAdapter(f"{name}, tensor {key[:80]!r}: {info.dtype} is not a dtype of adapter weights.")
    if info.elements == 0:
        raise CorruptAdapter(f"{name}, tensor {key[:80]!r} is empty.")
    offset = start + info.begin
    if offset % dtype.itemsize:  # a header of odd length: vector instructions want aligned numbers
        data, offset = data[offset : start + info.end], 0
    tensor = torch.frombuffer(data, dtype=dtype, count=info.elements, offset=offset).view(info.shape)
    if dtype.is_floating_point and not _finite(tensor):
        raise CorruptAdapter(f"{name}, tensor {key[:80]!r} holds NaN or infinity.")
    return tensor


def _finite(tensor: Tensor) -> bool:
    """By numpy, on one thread: adapters are read while the engine's threads denoise."""
    if tensor.dtype == torch.bfloat16:
        exponents = tensor.view(torch.uint16).numpy() & np.uint16(0x7F80)
        return bool((exponents != 0x7F80).all())
    if tensor.dtype.itemsize == 1:
        return bool(np.isfinite(tensor.float().numpy()).all())
    # Everything is added in float32, where larger numbers are infinite.
    return bool((np.abs(tensor.numpy()) <= np.finfo(np.float32).max).all())


def config_of(path: Path) -> Path | None:
    """The `adapter_config.json` that belongs to an adapter file: of peft's file, or of the only one in its folder."""
    config = path.parent / CONFIG
    alone = path.name == FOLDER_FILES[0] or len(list(path.parent.glob("*.safetensors"))) == 1
    return config if alone and config.is_file() else None


def _read_config(path: Path | None) -> tuple[bytes, dict[str, Any]]:
    if path is None:
        return b"", {}
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        config = json.loads(raw) if len(raw) <= MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CorruptAdapter(f"{CONFIG} beside the adapter is not a JSON object of less than 1 MiB.")
    return raw, config
