"""The language model's adapters as the front knows them: by name, with who was used last, and who may not leave.

Whoever loads one more than there is room for makes the least recently used one leave, unless it is pinned or a request
uses it. Loading and evicting are one change, made in all replicas or in none.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from multimodal_gen.adapters import AdapterInfo, AdapterSource, LoraState, SwapLoras
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.transaction import to_its_end
from multimodal_gen.errors import AdapterInUse, AdapterLimit, AdapterNotFound, did_you_mean
from multimodal_gen.llm.adapter_names import pinned_names, start_change
from multimodal_gen.messages import LorasChanged

UNLOAD_SECONDS = 30.0  # for the requests that use an adapter to end


@dataclass
class Entry:
    """One name."""

    info: AdapterInfo
    pinned: bool = False  # never evicted; unloaded all the same when somebody asks for that
    leaving: bool = False  # set while it waits to be unloaded: no request may begin with it


class Loading(NamedTuple):
    """What came of loading an adapter."""

    info: AdapterInfo
    evicted: tuple[str, ...]  # names that had to leave
    changed: bool  # False: exactly this was loaded
    seconds: float


class TextLoras:
    """All methods belong to the event loop of the engine's client."""

    def __init__(
        self,
        config: EngineConfig,
        change: Callable[[SwapLoras], Awaitable[LorasChanged]],
        users: Callable[[str], int],
        unload_s: float = UNLOAD_SECONDS,
    ) -> None:
        """
        Args:
            change: makes a change in all replicas or in none.
            users: unanswered requests that use the adapter of a digest.
            unload_s: how long unloading waits for them.

        Raises: InvalidValue, AdapterNotFound, UnsafeFormat for `--lora-paths`.
        """
        start_change(config)  # a file that is not there is told before the model is loaded
        self._limit = config.max_loras if config.max_loaded_loras is None else config.max_loaded_loras
        self._max_bytes = config.max_lora_mb << 20
        self._change = change
        self._users = users
        self._unload_s = unload_s
        self._pinned = pinned_names(config)
        self._entries: dict[str, Entry] = {}  # least recently used first
        self._changing = asyncio.Lock()
        self._answered = asyncio.Event()  # set, and replaced, whenever a request was answered

    # --- requests -----------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> dict[str, Entry]:
        """By name, the least recently used first."""
        return dict(self._entries)

    def find(self, name: str, param: str = "model") -> str:
        """The digest of the adapter of this name, which is now the last one used. Raises: AdapterNotFound."""
        entry = self._entries.get(name)
        if entry is None or entry.leaving:
            raise AdapterNotFound(
                f"No adapter {name[:128]!a} of the language model is loaded.{did_you_mean(name[:128], self._entries)} "
                "POST /v1/load_lora_adapter loads one.",
                param=param,
            )
        self._entries[name] = self._entries.pop(name)
        return entry.info.digest

    def answered(self) -> None:
        """A request has been answered: whoever waits for an adapter to be free looks again."""
        self._answered.set()
        self._answered = asyncio.Event()

    # --- changes ------------------------------------------------------------------------------------------------------

    def begin(self, state: LoraState) -> None:
        """What the first workers have loaded, as the settings say."""
        self._settle(state)
        for name in self._pinned:
            self._entries[name].pinned = True

    async def load(self, source: AdapterSource, *, pinned: bool = False) -> Loading:
        """Load a file under a name, which may mean another one from then on; requests that run keep theirs.

        Raises: AdapterLimit where nobody may leave; the change's own error, after which all is as before.
        """
        return await to_its_end(self._load(source, pinned))

    async def _load(self, source: AdapterSource, pinned: bool) -> Loading:
        async with self._changing:
            name = source.nickname
            if name in self._entries and self._entries[name].leaving:
                raise AdapterInUse(f"The adapter {name!r} is being unloaded; try again when it is gone.")
            evicted = self._victims(source)
            before, leaving = self._entries, set(evicted)
            # Nobody may begin with them while the workers let go of them.
            self._entries = {known: entry for known, entry in before.items() if known not in leaving}
            try:
                done = await self._change(SwapLoras(sources=(source,), unload=evicted))
            except BaseException:
                self._entries = before
                raise
            self._settle(done.state)
            entry = self._entries[name] = self._entries.pop(name)
            entry.pinned = pinned
            return Loading(entry.info, evicted, done.changed, done.seconds)

    async def unload(self, name: str) -> LorasChanged:
        """Forget a name. No new request may use it from now on; those that do have some time to end.

        Raises: AdapterNotFound; AdapterInUse where they have not, after which it can be used as before; the change's
        own error.
        """
        return await to_its_end(self._unload(name))

    async def _unload(self, name: str) -> LorasChanged:
        entry = self._entries.get(name)
        if entry is None or entry.leaving:
            raise AdapterNotFound(
                f"No adapter {name[:128]!a} of the language model is loaded.{did_you_mean(name[:128], self._entries)}",
                param="lora_name",
            )
        entry.leaving = True
        try:
            await self._unused(entry)
            async with self._changing:
                done = await self._change(SwapLoras(unload=(name,)))
                self._settle(done.state)
                return done
        finally:
            entry.leaving = False

    async def _unused(self, entry: Entry) -> None:
        try:
            await asyncio.wait_for(self._free(entry), self._unload_s)
        except asyncio.TimeoutError:
            users = self._users(entry.info.digest)
            raise AdapterInUse(
                f"{users} requests still use the adapter {entry.info.nickname!r} after {self._unload_s:g} s; it stays "
                "loaded. Cancel them, or try again.",
                param="lora_name",
            ) from None

    async def _free(self, entry: Entry) -> None:
        while self._used(entry, self._entries):
            await self._answered.wait()

    def _used(self, entry: Entry, among: Mapping[str, Entry]) -> bool:
        """Whether requests need this name's adapter, and no other name that stays has it."""
        others = (each for each in among.values() if each is not entry and not each.leaving)
        return self._users(entry.info.digest) > 0 and all(each.info.digest != entry.info.digest for each in others)

    def _victims(self, source: AdapterSource) -> tuple[str, ...]:
        """Who leaves so that there is room for one more, least recently used first. Raises: AdapterLimit."""
        if not self._limit:
            raise AdapterLimit("This server loads no adapters: --max-loras is 0.")
        others = {name: entry for name, entry in self._entries.items() if name != source.nickname}
        size = _size(source)
        victims: list[str] = []
        while len(others) >= self._limit or (others and size + _bytes(others.values()) > self._max_bytes):
            name = next((name for name, entry in others.items() if self._may_leave(entry, others)), None)
            if name is None:
                raise AdapterLimit(
                    f"{len(others)} adapters are loaded, and none of them may leave for another: each is pinned, or in "
                    "use. Unload one, try again later, or raise --max-loaded-loras or --max-lora-mb."
                )
            del others[name]
            victims.append(name)
        return tuple(victims)

    def _may_leave(self, entry: Entry, among: Mapping[str, Entry]) -> bool:
        return not (entry.pinned or entry.leaving or self._used(entry, among))

    def _settle(self, state: LoraState) -> None:
        """The names are those that the workers have; order and pins of those that stay are as they were."""
        infos = {info.nickname: info for info in state.loaded}
        kept = {name: entry for name, entry in self._entries.items() if name in infos}
        self._entries = kept | {name: Entry(info) for name, info in infos.items() if name not in kept}
        for name, info in infos.items():
            self._entries[name].info = info


def _size(source: AdapterSource) -> int:
    try:
        return os.stat(source.path).st_size
    except OSError:
        return 0  # whoever reads the file says what is wrong with it


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.info.bytes for entry in entries)
