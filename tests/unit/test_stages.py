"""Stages that families share: guidance, schedule, conditions cache."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from multimodal_gen.errors import CorruptModel
from multimodal_gen.pipelines.contract import CacheUse
from multimodal_gen.pipelines.stages.byte_cache import ByteCache
from multimodal_gen.pipelines.stages.flow_match import FlowMatchEuler
from multimodal_gen.pipelines.stages.guidance import guide
from multimodal_gen.pipelines.stages.solvers import load_solver
from multimodal_gen.pipelines.stages.unipc import UniPC

pytestmark = [pytest.mark.unit]


def test_guidance_and_its_norm_cap():
    torch.manual_seed(0)
    positive, negative = torch.randn(4, 6), torch.randn(4, 6)
    free = guide(positive, negative, 3.0, 0.0)
    torch.testing.assert_close(free, 4 * positive - 3 * negative)
    capped = guide(positive, negative, 3.0, 1.5)
    torch.testing.assert_close(capped.norm(), 1.5 * positive.norm())
    torch.testing.assert_close(capped / capped.norm(), free / free.norm())
    torch.testing.assert_close(guide(positive, negative, 3.0, 100.0), free)


SCHEDULES = [
    {"shift": 2.0},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"shift": 3.0, "use_karras_sigmas": True},
    {"shift": 3.0, "shift_terminal": 0.1},
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_the_schedule_and_steps_are_those_of_diffusers(options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    reference = FlowMatchEulerDiscreteScheduler(**options)
    steps, tokens = 5, 640
    state = FlowMatchEuler(reference.config).start_linear(steps, tokens)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)
    reference.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    assert torch.equal(state.timesteps, reference.timesteps)
    torch.manual_seed(0)
    ours = theirs = torch.randn(3, 4)
    for step, t in enumerate(reference.timesteps):
        velocity = torch.randn(3, 4)
        ours, state = state.advance(ours, velocity, step)
        theirs = reference.step(velocity, t, theirs, return_dict=False)[0]
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("steps", "options"),
    [(1, SCHEDULES[0]), *((steps, each) for steps in (2, 50) for each in (SCHEDULES[0], *SCHEDULES[3:]))],
    ids=str,
)
def test_the_schedule_of_the_training_sigmas_is_that_of_diffusers(steps, options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift in (None, 5.0):
        reference = FlowMatchEulerDiscreteScheduler(**{**options, **({} if shift is None else {"shift": shift})})
        state = FlowMatchEuler(FlowMatchEulerDiscreteScheduler(**options).config).start(steps, shift)
        reference.set_timesteps(steps)
        assert torch.equal(state.timesteps, reference.timesteps)
        assert torch.equal(state.sigmas, reference.sigmas)


UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 20])
@pytest.mark.parametrize(
    "options",
    [{}, {"solver_order": 1}, {"solver_order": 3}, {"disable_corrector": [0, 2]}],
    ids=str,
)
def test_unipc_takes_the_steps_of_diffusers(steps, options):
    from diffusers import UniPCMultistepScheduler

    reference = UniPCMultistepScheduler(**UNIPC, **options)
    reference.set_timesteps(steps)
    state = UniPC(reference.config).start(steps, None)
    assert torch.equal(state.timesteps, reference.timesteps)
    theirs = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    ours = theirs[0]
    for step, t in enumerate(reference.timesteps):
        ours, state = state.advance(ours, torch.sin(3 * ours + step), step)
        theirs = reference.step(torch.sin(3 * theirs + step), t, theirs, return_dict=False)[0]
        torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"solver_order": 3}], ids=str)
def test_unipc_goes_on_from_what_it_kept_bit_for_bit(options):
    steps, start = 9, UniPC({**UNIPC, **options}).start
    x, state = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), start(9, 5.0)
    kept = []
    for step in range(steps):
        kept.append((x, {name: tensor.clone() for name, tensor in state.tensors().items()}))
        x, state = state.advance(x, torch.sin(3 * x + step), step)
    for first, (y, tensors) in enumerate(kept):
        other = start(9, 5.0)
        other.restore(tensors, first)
        for step in range(first, steps):
            y, other = other.advance(y, torch.sin(3 * y + step), step)
        assert torch.equal(x, y), first


def test_unipc_refuses_what_it_does_not_solve():
    with pytest.raises(CorruptModel, match="prediction_type = 'epsilon'"):
        UniPC({**UNIPC, "prediction_type": "epsilon"})


def test_the_clean_estimate_is_where_a_straight_line_ends():
    from diffusers import FlowMatchEulerDiscreteScheduler

    state = FlowMatchEuler(FlowMatchEulerDiscreteScheduler(shift=2.0).config).start_linear(4, 64)
    clean, noise = torch.randn(5), torch.randn(5)
    for step, sigma in enumerate(state.sigmas[:-1]):
        x = (1 - sigma) * clean + sigma * noise
        torch.testing.assert_close(state.clean(x, noise - clean, step), clean)


def test_another_scheduler_is_refused_by_name(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(CorruptModel, match="DDIMScheduler"):
        load_solver(tmp_path)


@dataclass
class Blob:
    nbytes: int


def test_the_cache_keeps_by_content_and_forgets_the_least_recently_used():
    use, made = CacheUse(), []
    cache: ByteCache[Blob] = ByteCache(100, use)

    def get(name: str, size: int = 40) -> Blob:
        return cache.get((name, 1), lambda: made.append(name) or Blob(size))

    assert get("a") is get("a")
    get("b")
    get("a")
    get("c")  # 120 bytes: b leaves
    get("a")
    get("b")
    assert made == ["a", "b", "c", "b"]
    assert use.bytes <= 100
    get("huge", 101)
    get("huge", 101)
    assert made[-2:] == ["huge", "huge"]
    assert (use.hits, use.misses) == (3, 6)
