"""Two engines that are told the same plan the same and fail the same. Two threads with a real group between them stand
for two processes: the model is whole on each, so the votes are all that they say to one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.core import EngineCore
from multimodal_gen.engine.faults import Fault
from multimodal_gen.engine.ranks import Ranks
from multimodal_gen.engine.worker import TurnClock
from multimodal_gen.errors import MmgenError, OutOfMemory, PeerLost
from multimodal_gen.media.arrays import to_numpy
from multimodal_gen.messages import Cancel, Event, Failed, Finished, Generate, Progress, Started, Turn
from multimodal_gen.parallel.group import Group, Meeting
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.pipelines import registry
from multimodal_gen.request import ImageRequest, SamplingParams
from multimodal_gen.resolve import resolve
from tests.support.checkpoints import make_z_image

pytestmark = [pytest.mark.dist]

WAIT_S = 20.0


class Core:
    """One rank's engine, and what it planned and told."""

    def __init__(self, folder: Path, rank: int, store: HashStore) -> None:
        control = Group.connect(rank, 2, Meeting(store, WAIT_S), torch.device("cpu"), "control")
        mesh = dataclasses.replace(Mesh.solo(), rank=rank, control=control)
        config = EngineConfig(model_path=str(folder), dtype="float32")
        self.clock = TurnClock()
        self.engine = EngineCore(registry.describe(config), config, Ranks(mesh), self.clock)
        self.plans: list[object] = []
        self.events: list[Event] = []

    def plant(self, fault: str | None) -> None:
        self.engine.fault = Fault.parse(fault, self.engine.ranks.mesh.rank)
        self.engine._failures = 0

    def take(self, turns: list[Turn]) -> Core:
        """Run these turns, and then turns without messages until nothing is left; only rank 0 knows them."""
        self.plans, self.events = [], []
        plan, leads = self.engine.scheduler.plan, self.engine.ranks.leads
        left = list(turns)

        def recorded(most_tokens: int | None) -> object:
            self.plans.append(slots := plan(most_tokens))
            return slots

        self.engine.scheduler.plan = recorded  # type: ignore[method-assign, assignment]
        while left or not self.engine.idle:
            own = left.pop(0) if left else Turn(self.clock.now + 0.01, [])
            turn = self.engine.ranks.share(own if leads else None)
            self.clock.now = turn.clock
            for message in turn.messages:
                if isinstance(message, Generate):
                    self.events += self.engine.add(message.request)
                elif isinstance(message, Cancel):
                    self.events += self.engine.cancel(message.request_id)
            self.events += self.engine.step()
        self.engine.scheduler.plan = plan  # type: ignore[method-assign]
        return self

    def told(self) -> list[object]:
        """The events without measured times."""
        steps = (Started, Progress, Failed)
        return [event if isinstance(event, steps) else (type(event), event.request_id) for event in self._of(steps)]

    def _of(self, steps: tuple[type, ...]) -> list[Event]:
        return [event for event in self.events if isinstance(event, (*steps, Finished))]

    def latents(self, name: str) -> np.ndarray:
        (found,) = [e for e in self.events if isinstance(e, Finished) and e.request_id == name]
        return to_numpy(found.outputs[0])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Core], object]], list]:
    folder = make_z_image(tmp_path_factory.mktemp("model") / "z")
    store, pool = HashStore(), ThreadPoolExecutor(2)
    cores = list(pool.map(lambda rank: Core(folder, rank, store), range(2)))

    def run(work: Callable[[Core], object]) -> list:
        return list(pool.map(work, cores))

    run.card = cores[0].engine.pipeline.card  # type: ignore[attr-defined]
    return run


def request(both: Callable, name: str, steps: int = 3, **params: object) -> ImageRequest:
    deadline = params.pop("deadline_s", None)
    settings = {"width": 64, "height": 64, "num_inference_steps": steps, "seed": 3, **params}
    made = resolve(
        request_id=name,
        prompt=f"a red cat {name}",
        params=SamplingParams(**settings),
        card=both.card,  # type: ignore[attr-defined]
        max_cost=10**9,
        output="latent",
    )
    return msgspec.structs.replace(made, deadline_s=deadline)


def turns(*messages: list) -> list[Turn]:
    return [Turn(1000.0 + number, list(part)) for number, part in enumerate(messages)]


def test_the_same_turns_are_the_same_plans_deadlines_and_cancels_included(both: Callable) -> None:
    script = turns(
        [Generate(request(both, "long", steps=9)), Generate(request(both, "late", steps=9, deadline_s=3.5))],
        [Generate(request(both, "large", width=128, height=96, num_outputs_per_prompt=2))],
        [Generate(request(both, "first", priority=5)), Cancel("nobody")],
        [Cancel("long")],
        [],
        [Generate(request(both, "urgent", deadline_s=20.0))],
    )
    leader, follower = both(lambda core: core.take(script))
    assert leader.plans == follower.plans
    assert leader.told() == follower.told()
    assert [e.error.code for e in leader.events if isinstance(e, Failed)] == ["cancelled", "deadline_exceeded"]
    assert {e.request_id for e in leader.events if isinstance(e, Finished)} == {"large", "first", "urgent"}
    for name in ("large", "first", "urgent"):
        assert np.array_equal(leader.latents(name), follower.latents(name))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_ran_out_of_memory_on_one_rank_is_taken_again_by_all(both: Callable, rank: int) -> None:
    script = turns([Generate(request(both, "a")), Generate(request(both, "b", seed=4))])
    undisturbed = both(lambda core: core.take(script))
    want = [undisturbed[0].latents(name) for name in "ab"]
    before = both(lambda core: core.engine.scheduler.max_batch_tokens)

    def disturbed(core: Core) -> Core:
        core.plant(f"denoise:oom:1@{rank}")
        return core.take(script)

    cores = both(disturbed)
    smaller, same = (core.engine.scheduler.max_batch_tokens for core in cores)
    assert smaller == same < before[0]
    assert cores[0].plans == cores[1].plans
    for core in cores:
        for name, wanted in zip("ab", want, strict=True):
            assert np.abs(core.latents(name) - wanted).max() < 1e-4, "a row moved twice, or not at all"
        core.engine.scheduler.max_batch_tokens = before[0]


@pytest.mark.parametrize(("stage", "code"), [("encode", "generation_failed"), ("prepare", "generation_failed")])
def test_a_failure_on_one_rank_ends_the_request_on_all(both: Callable, stage: str, code: str) -> None:
    def disturbed(core: Core) -> Core:
        core.plant(f"{stage}:raise:1@1")
        return core.take(turns([Generate(request(both, f"{stage}-bad")), Generate(request(both, "good"))]))

    cores = both(disturbed)
    for core in cores:
        (failed,) = [e for e in core.events if isinstance(e, Failed)]
        assert (failed.request_id, failed.error.code) == (f"{stage}-bad", code)
        assert core.latents("good").shape == (16, 8, 8)
    caches = [core.engine.pipeline.info.cache for core in cores]
    assert caches[0].bytes == caches[1].bytes, "one would compute with the other what the other finds in its cache"


def test_a_short_memory_outweighs_other_errors(both: Callable) -> None:
    def vote(core: Core) -> MmgenError | None:
        own = [ValueError("odd"), OutOfMemory("The device ran out of memory.")][core.engine.ranks.mesh.rank]
        return core.engine.ranks.agree("this", own)

    assert [error.code for error in both(vote)] == ["out_of_memory", "out_of_memory"]
    assert both(lambda core: core.engine.ranks.agree("this", None)) == [None, None]


def test_ranks_that_come_apart_say_so(both: Callable) -> None:
    def vote(core: Core) -> str:
        with pytest.raises(PeerLost) as caught:
            core.engine.ranks.agree(f"work {core.engine.ranks.mesh.rank}", None)
        return caught.value.message

    assert all("come apart" in message for message in both(vote))
