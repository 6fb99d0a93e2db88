"""Names of adapters in the front: least recently used, pins, what is in use, and changes that fail."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest

from multimodal_gen.adapters import AdapterInfo, AdapterSource, LoraState, SwapLoras
from multimodal_gen.cli.lora import inspect
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.text_loras import TextLoras
from multimodal_gen.errors import AdapterInUse, AdapterLimit, AdapterNotFound, CorruptAdapter, InvalidValue
from multimodal_gen.llm.adapter_names import parse_flags, pinned_names, split_model
from multimodal_gen.messages import LorasChanged
from tests.support.text_adapters import write_poet

pytestmark = [pytest.mark.unit]


class Workers:
    """What the replicas hold, and the front's names over it."""

    def __init__(self, unload_s: float = 5.0, **config: Any) -> None:
        self.state = LoraState()
        self.broken = False
        self.seconds = 0.0  # that a change takes
        self.bytes = 1000  # of every adapter
        self.users = Counter[str]()
        self.names = TextLoras(EngineConfig(**config), self.change, lambda digest: self.users[digest], unload_s)

    async def change(self, change: SwapLoras) -> LorasChanged:
        await asyncio.sleep(self.seconds)
        if self.broken:
            raise CorruptAdapter("The file is broken.")
        loaded = {info.nickname: info for info in self.state.loaded if info.nickname not in change.unload}
        for source in change.sources:
            loaded[source.nickname] = self._info(source)
        changed = tuple(loaded.values()) != self.state.loaded
        self.state = LoraState(loaded=tuple(loaded.values()))
        return LorasChanged("", self.state, changed, 0.1, "text")

    def _info(self, source: AdapterSource) -> AdapterInfo:
        digest = f"digest of {source.path}"
        return AdapterInfo(
            nickname=source.nickname, path=source.path, digest=digest, sha256=digest, format="peft: lora", rank=4,
            bytes=self.bytes, modules={"text": 1}, source=source,
        )  # fmt: skip

    def begins(self, name: str) -> str:
        """A request that names an adapter is admitted."""
        digest = self.names.find(name)
        self.users[digest] += 1
        return digest

    def ends(self, digest: str) -> None:
        """It is answered."""
        self.users[digest] -= 1
        self.names.answered()


def source(name: str, path: str = "") -> AdapterSource:
    return AdapterSource(nickname=name, path=path or f"/nowhere/{name}.safetensors")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


async def loaded(workers: Workers, *names: str, pinned: bool = False) -> None:
    for name in names:
        await workers.names.load(source(name), pinned=pinned)


def test_the_least_recently_used_leaves_for_one_more():
    async def work() -> None:
        workers = Workers(max_loaded_loras=3)
        await loaded(workers, "a", "b", "c")
        workers.names.find("a")
        done = await workers.names.load(source("d"))
        assert done.evicted == ("b",)
        assert [info.nickname for info in workers.state.loaded] == ["a", "c", "d"]
        assert list(workers.names.entries) == ["c", "a", "d"]
        with pytest.raises(AdapterNotFound, match="'b'"):
            workers.names.find("b")

    run(work())


def test_pinned_adapters_and_those_in_use_never_leave():
    async def work() -> None:
        workers = Workers(max_loaded_loras=3)
        await loaded(workers, "a", pinned=True)
        await loaded(workers, "b", "c")
        digest = workers.begins("b")
        assert (await workers.names.load(source("d"))).evicted == ("c",)
        assert (await workers.names.load(source("e"))).evicted == ("d",)
        workers.begins("e")
        with pytest.raises(AdapterLimit, match="pinned, or in use"):
            await workers.names.load(source("f"))
        workers.ends(digest)
        assert (await workers.names.load(source("f"))).evicted == ("b",)

    run(work())


def test_memory_is_a_limit_too(tmp_path):
    async def work() -> None:
        workers = Workers(max_lora_mb=1)
        workers.bytes = 400 << 10
        await loaded(workers, "a", "b")
        file = tmp_path / "c.safetensors"
        file.write_bytes(bytes(400 << 10))
        assert (await workers.names.load(source("c", str(file)))).evicted == ("a",)

    run(work())


def test_a_change_that_fails_leaves_every_name_as_it_was():
    async def work() -> None:
        workers = Workers(max_loaded_loras=2)
        await loaded(workers, "a", "b")
        before = workers.names.entries
        workers.broken = True
        with pytest.raises(CorruptAdapter):
            await workers.names.load(source("c"))
        with pytest.raises(CorruptAdapter):
            await workers.names.unload("a")
        assert workers.names.entries == before
        workers.names.find("a")

    run(work())


def test_nobody_can_begin_with_what_is_on_its_way_out():
    async def work() -> None:
        workers = Workers(max_loaded_loras=1)
        await loaded(workers, "a")
        workers.seconds = 0.05
        loading = asyncio.create_task(workers.names.load(source("b")))
        await asyncio.sleep(0.01)
        with pytest.raises(AdapterNotFound):
            workers.names.find("a")
        await loading

    run(work())


def test_unloading_waits_for_the_requests_that_use_it():
    async def work() -> None:
        workers = Workers()
        await loaded(workers, "a")
        digest = workers.begins("a")
        unloading = asyncio.create_task(workers.names.unload("a"))
        await asyncio.sleep(0.01)
        assert not unloading.done()
        with pytest.raises(AdapterNotFound):
            workers.names.find("a")
        with pytest.raises(AdapterInUse, match="being unloaded"):
            await workers.names.load(source("a"))
        await loaded(workers, "b")  # others are not held up
        workers.ends(digest)
        await unloading
        assert [info.nickname for info in workers.state.loaded] == ["b"]

    run(work())


def test_one_of_two_names_for_the_same_adapter_may_go_at_any_time():
    async def work() -> None:
        workers = Workers(unload_s=0.05, max_loaded_loras=2)
        await workers.names.load(source("a", "/nowhere/same.safetensors"))
        await workers.names.load(source("b", "/nowhere/same.safetensors"))
        workers.begins("a")
        await workers.names.unload("a")
        with pytest.raises(AdapterInUse):
            await workers.names.unload("b")
        await workers.names.load(source("a", "/nowhere/same.safetensors"))
        assert len((await workers.names.load(source("c"))).evicted) == 1
        workers.begins("c")
        with pytest.raises(AdapterLimit):
            await workers.names.load(source("d"))

    run(work())


def test_a_limit_of_zero_loads_nothing():
    async def work() -> None:
        with pytest.raises(AdapterLimit, match="--max-loras is 0"):
            await Workers(max_loras=0).names.load(source("a"))

    run(work())


def test_unloading_gives_up_after_a_while_and_the_adapter_goes_on():
    async def work() -> None:
        workers = Workers(unload_s=0.05)
        await loaded(workers, "a")
        digest = workers.begins("a")
        with pytest.raises(AdapterInUse, match="1 requests still use"):
            await workers.names.unload("a")
        assert workers.names.find("a") == digest

    run(work())


def test_a_name_may_be_loaded_anew_while_requests_use_what_it_meant():
    async def work() -> None:
        workers = Workers(max_loaded_loras=1)
        await loaded(workers, "a")
        old = workers.begins("a")
        done = await workers.names.load(source("a", "/nowhere/other.safetensors"), pinned=True)
        assert done.evicted == ()
        assert workers.names.find("a") != old
        assert workers.names.entries["a"].pinned

    run(work())


def test_a_thousand_random_requests_and_loads_leave_no_use_behind():
    async def work() -> None:
        rng, workers = random.Random(5), Workers(max_loaded_loras=3)
        running: list[str] = []
        for _ in range(1000):
            name = rng.choice("abcdef")
            action = rng.random()
            if action < 0.5 and name in workers.names.entries:
                running.append(workers.begins(name))
            elif action < 0.8 and running:
                workers.ends(running.pop(rng.randrange(len(running))))
            elif action < 0.97:
                try:
                    await workers.names.load(source(name), pinned=rng.random() < 0.1)
                except AdapterLimit:
                    assert all(e.pinned or workers.users[e.info.digest] for e in workers.names.entries.values())
            elif name in workers.names.entries and not workers.users[workers.names.entries[name].info.digest]:
                await workers.names.unload(name)
            held = {info.digest for info in workers.state.loaded}
            assert set(running) <= held, "an adapter left while a request used it"
            assert len(held) <= 3
        for digest in running:
            workers.ends(digest)
        assert not +workers.users

    run(work())


def test_flags_name_files_and_pins(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x")
    config = EngineConfig(lora_paths=[f"a={file}", f"b={file}:pinned"])
    assert [(flag.name, flag.path, flag.pinned) for flag in parse_flags(config)] == [
        ("a", str(file), False),
        ("b", str(file), True),
    ]
    assert pinned_names(config) == {"b"}
    assert parse_flags(config)[0].source.path == str(file)
    for wrong in ("a", "a=", "=x", "a=:pinned", "a b=x"):
        with pytest.raises(InvalidValue):
            parse_flags(EngineConfig(lora_paths=[wrong]))
    with pytest.raises(InvalidValue, match="twice"):
        parse_flags(EngineConfig(lora_paths=["a=x", "a=y"]))


def test_a_model_name_may_end_with_an_adapter():
    known = ("smollm2", "llama:8b")
    assert split_model("smollm2", known) == ("smollm2", None)
    assert split_model("smollm2:poet", known) == ("smollm2", "poet")
    assert split_model("llama:8b", known) == ("llama:8b", None)
    assert split_model("llama:8b:poet", known) == ("llama:8b", "poet")
    assert split_model("other:poet", known) == ("other:poet", None)


def test_inspecting_a_file_says_that_it_fits_language_models(tmp_path):
    facts = inspect(write_poet(tmp_path) / "poet.safetensors")
    assert facts["families"]["language models"] == "2 of 2 modules"
