"""A cache by content, bounded in bytes: encoded prompts, modulations of a timestep."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from multimodal_gen.pipelines.contract import CacheUse


class Sized(Protocol):
    """Anything that knows its size in bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


Value = TypeVar("Value", bound=Sized)


@dataclass
class ByteCache(Generic[Value]):
    """Least recently used entries leave first. A value larger than the whole cache is not kept."""

    max_bytes: int
    use: CacheUse

    def __post_init__(self) -> None:
        self._entries: OrderedDict[bytes, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value for a key of strings and numbers, made on a miss."""
        digest = hashlib.sha256(msgspec.msgpack.encode(key)).digest()
        if digest in self._entries:
            self._entries.move_to_end(digest)
            self.use.hits += 1
            return self._entries[digest]
        self.use.misses += 1
        value = make()
        if value.nbytes <= self.max_bytes:
            self._entries[digest] = value
            self.use.bytes += value.nbytes
            while self.use.bytes > self.max_bytes:
                self.use.bytes -= self._entries.popitem(last=False)[1].nbytes
        return value

    def clear(self) -> None:
        """Drop every entry."""
        self._entries.clear()
        self.use.bytes = 0
