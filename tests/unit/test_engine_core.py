"""The engine with the bundled model: what a step yields, and that one request's failure is its own."""

from __future__ import annotations

import numpy as np
import pytest

from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.active import preview_steps
from multimodal_gen.engine.core import EngineCore
from multimodal_gen.engine.faults import Fault
from multimodal_gen.errors import ConfigError
from multimodal_gen.media.arrays import to_numpy
from multimodal_gen.messages import Event, Failed, Finished, Preview, Progress, Started
from multimodal_gen.pipelines import registry
from multimodal_gen.request import ImageRequest, SamplingParams
from multimodal_gen.resolve import resolve

pytestmark = [pytest.mark.unit]

CONFIG = EngineConfig(dtype="float32")
CARD = registry.describe(CONFIG)


@pytest.fixture(scope="module")
def core() -> EngineCore:
    return EngineCore(CARD, CONFIG)


@pytest.fixture
def faulty(core):
    """Plant a fault in the shared engine for one test."""

    def plant(text: str) -> EngineCore:
        core.fault = Fault.parse(text)
        core._failures = 0
        return core

    yield plant
    core.fault = Fault.parse(None)
    core._failures = 0


def request(name: str, *, steps: int = 2, previews: int = 0, prompt: str = "a rocket", **params) -> ImageRequest:
    params = {"width": 64, "height": 64, "seed": 1, "num_inference_steps": steps, **params}
    return resolve(
        request_id=name, prompt=prompt, params=SamplingParams(**params), card=CARD, max_cost=10**9, previews=previews
    )


def run(core: EngineCore, *requests: ImageRequest) -> list[Event]:
    for r in requests:
        core.add(r)
    events: list[Event] = []
    while not core.idle:
        events += core.step()
    return events


def of(events: list[Event], kind: type, name: str) -> list:
    return [event for event in events if isinstance(event, kind) and event.request_id == name]


def test_a_request_starts_progresses_and_finishes_in_seed_order(core):
    events = run(core, request("a", steps=3, num_outputs_per_prompt=2))
    assert [type(e) for e in events if isinstance(e, (Started, Finished))] == [Started, Finished]
    assert sorted((e.index, e.step) for e in of(events, Progress, "a")) == [(i, s) for i in (0, 1) for s in (1, 2, 3)]
    assert [e.more for e in of(events, Progress, "a")] == [True, False] * 3, "the last of a step waits for nothing"
    (finished,) = of(events, Finished, "a")
    first, second = (to_numpy(array) for array in finished.outputs)
    assert first.shape == (64, 64, 3)
    assert not np.array_equal(first, second)
    (alone,) = of(run(core, request("b", steps=3, seed=2)), Finished, "b")
    assert np.abs(to_numpy(alone.outputs[0]).astype(int) - second).max() <= 1
    timings = finished.timings
    assert timings.steps == 3
    assert 0 < timings.denoise < timings.total


def test_a_request_joins_while_another_runs(core):
    core.add(request("long", steps=6))
    events = [*core.step(), *core.step()]
    core.add(request("short", steps=2))
    while not core.idle:
        events += core.step()
    finished = [e.request_id for e in events if isinstance(e, Finished)]
    assert finished == ["short", "long"]


def test_previews_are_estimates_of_the_clean_image(core):
    events = run(core, request("p", steps=8, previews=3, width=128, height=128))
    previews = of(events, Preview, "p")
    assert [e.number for e in previews] == [0, 1, 2]
    final = to_numpy(of(events, Finished, "p")[0].outputs[0]).astype(float)
    distances = [np.abs(to_numpy(e.image) - final).mean() for e in previews]
    assert distances[0] > distances[1] > distances[2]


@pytest.mark.parametrize(("steps", "previews"), [(20, 3), (2, 3), (1, 3), (7, 1), (5, 0)])
def test_preview_steps_lie_strictly_inside(steps, previews):
    chosen = preview_steps(steps, previews)
    assert len(chosen) == min(previews, steps - 1)
    assert all(0 < step < steps for step in chosen)


def test_a_cancelled_request_is_gone_before_the_next_step(core):
    core.add(request("keep", steps=4))
    core.add(request("drop", steps=4))
    list(core.step())
    (event,) = core.cancel("drop")
    assert event.error.code == "cancelled"
    rest = []
    while not core.idle:
        rest += core.step()
    assert of(rest, Finished, "keep")
    assert not of(rest, Progress, "drop")
    assert core.cancel("drop") == []


def test_a_failing_batch_is_tried_row_by_row(faulty):
    core = faulty("denoise:raise:1")
    events = run(core, request("a"), request("b"))
    assert len([e for e in events if isinstance(e, Finished)]) == 2


def test_a_batch_that_runs_out_of_memory_makes_the_next_ones_smaller(faulty):
    core = faulty("denoise:oom:1")
    before = core.scheduler.max_batch_tokens
    events = run(core, request("a"), request("b"))
    assert len([e for e in events if isinstance(e, Finished)]) == 2
    one = 2 * (16 + 16 + 32)  # two branches of 16 patches padded to 32, and a caption of 32
    assert core.scheduler.max_batch_tokens == one
    core.scheduler.max_batch_tokens = before


@pytest.mark.parametrize("stage", ["encode", "prepare", "decode"])
def test_one_failure_ends_one_request(faulty, stage):
    core = faulty(f"{stage}:raise:1")
    events = run(core, request("a", prompt=f"{stage} a"), request("b", prompt=f"{stage} b"))
    failed = [e for e in events if isinstance(e, Failed)]
    finished = [e for e in events if isinstance(e, Finished)]
    assert len(failed) == len(finished) == 1
    assert failed[0].error.code == "generation_failed"
    assert "InjectedFault" in failed[0].error.message
    assert "/" not in failed[0].error.message


def test_out_of_memory_has_its_own_error(faulty):
    core = faulty("denoise:oom:1")
    (failed,) = of(run(core, request("a")), Failed, "a")
    assert failed.error.code == "out_of_memory"


def test_failures_in_a_row_make_it_sick_and_a_success_heals(faulty):
    core = faulty("denoise:raise:2")
    run(core, request("a"))
    run(core, request("b"))
    assert not core.sick
    run(core, request("c"))
    core.fault = Fault.parse("denoise:raise:3")
    for name in "def":
        assert not core.sick
        run(core, request(name))
    assert core.sick


def test_the_conditions_cache_serves_repeats(core):
    use = core.pipeline.info.cache
    run(core, request("a", prompt="a prompt that nobody used before"))
    hits, misses = use.hits, use.misses
    run(core, request("b", prompt="a prompt that nobody used before", num_outputs_per_prompt=3))
    assert use.misses == misses
    assert use.hits > hits


def test_a_cut_prompt_is_reported(core):
    (finished,) = of(run(core, request("a", prompt="a red apple and a rocket", max_sequence_length=6)), Finished, "a")
    assert finished.prompt_tokens == 6
    assert "prompt was cut to 6 tokens" in finished.warnings[0]


def test_a_fault_may_be_one_rank_s_alone():
    assert [Fault.parse("decode:kill:2@1", rank).count for rank in range(3)] == [0, 2, 0]
    assert [Fault.parse("decode:kill:2", rank).count for rank in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("text", ["nonsense", "denoise:explode:1", "sleep:raise:1", "denoise:raise:x", "load:kill:1@"])
def test_a_misspelt_fault_is_refused(text):
    with pytest.raises(ConfigError, match="STAGE:ACTION:COUNT"):
        Fault.parse(text)
