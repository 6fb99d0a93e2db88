"""What ranks that share a language model answer; each function runs on every rank of a mesh."""

from __future__ import annotations

import random
import re
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.attempt import agreed
from multimodal_gen.engine.ranks import Ranks
from multimodal_gen.llm.card import describe
from multimodal_gen.llm.core import TextCore
from multimodal_gen.llm.sampling import Sampled
from multimodal_gen.llm.sequence import Slot
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.text import TextRequest, TextSampling
from tests.support.text import Clock
from tests.support.text_core import GREEDY, Driver, ask, grammar


def open_shared(mesh: Mesh, folder: str, **settings: Any) -> TextCore:
    """A core of this rank; the others have the rest of it."""
    config = EngineConfig(llm_path=folder, llm_dtype="float32", device="cpu", tp_size=mesh.tp.size, **settings)
    return TextCore(describe(config), config, mesh, Clock(), partial(agreed, Ranks(mesh)))


def requests(count: int, sampled: bool) -> list[TextRequest]:
    """Random ones, of which many begin alike."""
    rng = random.Random(3)
    return [
        ask(
            f"r{number}",
            [rng.randrange(3, 6) for _ in range(rng.randint(1, 30))],
            rng.randint(4, 20),
            n=1 + (number % 7 == 0),
            sampling=TextSampling(temperature=1.0, seed=number) if sampled and number % 2 else GREEDY,
        )
        for number in range(count)
    ]


def answers(mesh: Mesh, folder: str, sampled: bool = True, aborts: bool = False, **settings: Any) -> dict[str, Tensor]:
    """Tokens of every choice, and the steps that it took."""
    core = open_shared(mesh, folder, kv_page_size=4, chunked_prefill_size=24, **settings)
    driver, rng = Driver(core), random.Random(4)
    for request in requests(40, sampled):
        driver.add(request)
        driver.step()
        if aborts and rng.random() < 0.3:
            driver.note(core.cancel(rng.choice([*core.scheduler.running_ids, *core.scheduler.queued_ids, "nobody"])))
    heard = driver.run()
    assert core.gauges().kv_pages_used == 0
    told = {
        f"{name}.{index}": torch.tensor(output.token_ids)
        for name, outputs in heard.outputs.items()
        for index, output in enumerate(outputs)
    }
    gauges = core.gauges()
    return told | {"counts": torch.tensor([len(heard.events), gauges.preemptions, gauges.cached_tokens])}


def one_fails(mesh: Mesh, folder: str) -> dict[str, Tensor]:
    """The last rank alone fails, after a step in which request b has its third token."""
    core = open_shared(mesh, folder)
    run = core.runner.run

    def fails(slots: list[Slot], *rest: Any) -> list[Sampled]:
        done = run(slots, *rest)
        last = mesh.rank == mesh.degrees.world - 1
        if last and any(slot.sequence.request.id == "b" and slot.sequence.generated == 2 for slot in slots):
            raise RuntimeError("broken")
        return done

    core.runner.run = fails  # type: ignore[method-assign]
    driver = Driver(core)
    driver.add(*(ask(name, range(start, start + 10), 6) for name, start in (("a", 5), ("b", 30), ("c", 60))))
    heard = driver.run()
    assert {name: error.code for name, error in heard.failed.items()} == {"b": "generation_failed"}
    return {name: torch.tensor(heard.ids(name)) for name in "ac"}


def sleeps(mesh: Mesh, folder: str) -> dict[str, Tensor]:
    """The same before and after."""
    core = open_shared(mesh, folder)
    found = {}
    for name in ("before", "after"):
        driver = Driver(core)
        driver.add(ask(name, range(5, 20), 6))
        found[name] = torch.tensor(driver.run().ids(name))
        core.sleep()
        core.wake()
    return found


def grammars(mesh: Mesh, folder: str) -> dict[str, Tensor]:
    """Answers to a grammar, some of them drawn."""
    core = open_shared(mesh, folder)
    rule = grammar(core, "regex", "[ab]{4,8}")
    driver = Driver(core)
    for number, sampling in enumerate([GREEDY, *(TextSampling(temperature=2.0, seed=seed) for seed in range(3))]):
        driver.add(ask(f"r{number}", range(5, 20), 12, sampling=sampling, grammar=rule, ignore_eos=False))
    driver.add(ask("free", range(5, 20), 12))
    heard = driver.run()
    assert all(re.fullmatch("[ab]{4,8}", heard.outputs[f"r{number}"][0].text) for number in range(4))
    return {name: torch.tensor(heard.ids(name)) for name in heard.outputs}
