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


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_schedule_and_steps_are_those_of_diffusers(tmp_path, dynamic):
    from diffusers import FlowMatchEulerDiscreteScheduler

    reference = FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=dynamic)
    reference.save_pretrained(tmp_path)
    steps, tokens = 5, 640
    state = FlowMatchEuler(tmp_path).start(steps, tokens)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)
    reference.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    assert torch.equal(state.timesteps, reference.timesteps)
    torch.manual_seed(0)
    ours = theirs = torch.randn(3, 4)
    for step, t in enumerate(reference.timesteps):
        velocity = torch.randn(3, 4)
        ours = state.advance(ours, velocity, step)
        theirs = reference.step(velocity, t, theirs, return_dict=False)[0]
        assert torch.equal(ours, theirs)


def test_the_clean_estimate_is_where_a_straight_line_ends(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(tmp_path)
    state = FlowMatchEuler(tmp_path).start(4, 64)
    clean, noise = torch.randn(5), torch.randn(5)
    for step, sigma in enumerate(state.sigmas[:-1]):
        x = (1 - sigma) * clean + sigma * noise
        torch.testing.assert_close(state.clean(x, noise - clean, step), clean)


def test_another_scheduler_is_refused_by_name(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(CorruptModel, match="DDIMScheduler"):
        FlowMatchEuler(tmp_path)


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
