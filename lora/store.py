"""The adapters that are loaded, by nickname and by digest."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from multimodal_gen.adapters import AdapterInfo, AdapterSource
from multimodal_gen.errors import AdapterError, AdapterLimit, AdapterNotFound, CorruptAdapter, MmgenError
from multimodal_gen.lora.adapter import Adapter
from multimodal_gen.lora.bind import Spellings, bind
from multimodal_gen.lora.file import config_of, read_adapter
from multimodal_gen.lora.formats.registry import parse

log = logging.getLogger(__name__)

Stamp = tuple[int, ...]


class Limits(NamedTuple):
    """Of what one model holds."""

    adapters: int
    mb: int  # of all their tensors
    rank: int  # of one module
    flag: str  # the setting that `adapters` comes from, for messages
    cure: str  # what to do where they are too many


class Loaded(NamedTuple):
    """One adapter in memory."""

    info: AdapterInfo
    adapter: Adapter
    stamp: Stamp  # of its files: the same source with the same stamp is not read again


class AdapterStore:
    """Owns every adapter's tensors.

    A nickname can be loaded anew or unloaded while requests still run with what it meant: such an adapter stays until
    nobody pins it, and one change longer, for requests that were sent before the change was known.
    """

    def __init__(self, limits: Limits, spellings: Mapping[str, Spellings]) -> None:
        self.limits = limits
        self.by_name: dict[str, Loaded] = {}
        self._by_digest: dict[str, Loaded] = {}
        self._spellings = spellings
        self._pinned: Counter[str] = Counter()  # digest → requests that run with it
        self._used: frozenset[str] = frozenset()  # digests that are active, with a name or without
        self._before: frozenset[str] = frozenset()  # digests that had a name or were active before the last change

    def find(self, digest: str) -> Adapter:
        """The adapter of a pin. Raises: AdapterNotFound."""
        if digest not in self._by_digest:
            raise AdapterNotFound("An adapter of this request was unloaded before the request ran; send it again.")
        return self._by_digest[digest].adapter

    def load(self, source: AdapterSource, names: Mapping[str, Loaded]) -> Loaded:
        """Read, check and bind a file; the store is unchanged. Safe beside a running engine.

        Args:
            names: what will be loaded besides, for the limits.

        Raises: the AdapterError family.
        """
        known = names.get(source.nickname)
        stamp = _stamp(Path(source.path))
        if known is not None and known.info.source == source and known.stamp == stamp:
            return known
        others = [loaded for name, loaded in names.items() if name != source.nickname]
        limits = self.limits
        if len(others) >= limits.adapters:
            raise AdapterLimit(f"{len(others)} adapters are loaded, which is {limits.flag}; {limits.cure}.")
        held = sum(loaded.info.bytes for loaded in others)
        loaded = self._read(source, stamp, (limits.mb << 20) - held)
        if held + loaded.info.bytes > limits.mb << 20:
            raise AdapterLimit(
                f"With {source.nickname!r} the adapters would take more than --max-lora-mb, which is {limits.mb}; "
                "unload others."
            )
        return loaded

    def _read(self, source: AdapterSource, stamp: Stamp, max_bytes: int) -> Loaded:
        try:
            file = read_adapter(Path(source.path), max_bytes)
            parsed = parse(file, source.alpha)
            bound = bind(parsed, self._spellings, allow_partial=source.allow_partial, name=file.name)
        except MmgenError:
            raise
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            # A file is data of strangers; whatever it holds, it is the file that is at fault.
            log.exception("%s cannot be read", source.nickname)
            raise CorruptAdapter(f"The adapter {source.nickname!r} cannot be read ({type(error).__name__}).") from None
        adapter = bound.adapter
        if adapter.rank > self.limits.rank:
            raise AdapterError(
                f"{file.name} has rank {adapter.rank}; --max-lora-rank is {self.limits.rank} on this server."
            )
        digest = hashlib.sha256(f"{file.digest} alpha={source.alpha}".encode()).hexdigest()
        info = AdapterInfo(
            nickname=source.nickname,
            path=source.path,
            digest=digest,
            sha256=file.sha256,
            format=parsed.format,
            rank=adapter.rank,
            bytes=max(file.size, adapter.nbytes),  # tensors are views of the whole file
            modules=bound.modules,
            skipped=bound.skipped,
            merge_only=adapter.merge_only(),
            source=source,
        )
        return Loaded(info, adapter, stamp)

    def replace(self, names: Mapping[str, Loaded], used: Iterable[str], *, keep_unloaded: bool = True) -> None:
        """Make `names` what is loaded.

        Args:
            used: digests of active pins, kept even without a name.
            keep_unloaded: whether requests may be on their way with a name that is gone; with one that means another
                adapter from now on they always may.
        """
        known = self.by_name.items() if keep_unloaded else ((n, old) for n, old in self.by_name.items() if n in names)
        before = frozenset(loaded.info.digest for _, loaded in known) | self._used
        self.by_name = dict(names)
        for loaded in names.values():
            self._by_digest[loaded.info.digest] = loaded
        self._used, self._before = frozenset(used), before
        self.sweep()

    def pin(self, digests: Iterable[str]) -> Callable[[], None]:
        """Keep these adapters until the returned function is called."""
        kept = tuple(digests)
        self._pinned.update(kept)

        def release() -> None:
            self._pinned.subtract(kept)

        return release

    @property
    def pinned(self) -> int:
        """Pins that were not released."""
        return self._pinned.total()

    def __len__(self) -> int:
        return len(self._by_digest)

    def __contains__(self, digest: str) -> bool:
        return digest in self._by_digest

    def sweep(self) -> None:
        """Let go of what nobody needs any more."""
        wanted = {loaded.info.digest for loaded in self.by_name.values()} | self._used | self._before
        wanted |= {digest for digest, count in self._pinned.items() if count > 0}
        self._pinned = +self._pinned
        self._by_digest = {digest: loaded for digest, loaded in self._by_digest.items() if digest in wanted}


def _stamp(file: Path) -> Stamp:
    try:
        found = [os.stat(path) for path in (file, config_of(file)) if path is not None]
    except OSError as error:
        raise CorruptAdapter(f"{file.name} cannot be read: {error.strerror}.") from None
    return tuple(number for stat in found for number in (stat.st_size, stat.st_mtime_ns, stat.st_ino))
