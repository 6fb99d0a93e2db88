"""What is fetched ahead of the layer that computes: across passes, models and experts."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from multimodal_gen import DiffGenerator
from multimodal_gen.engine.local import LocalEngine
from multimodal_gen.memory.ring import Ring
from tests.support.checkpoints import PROMPT, make_z_image
from tests.support.wan_checkpoints import make_wan

pytestmark = [pytest.mark.unit]

VIDEO: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 6, "seed": 1}
IMAGE: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 0.0, "seed": 1}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(layer, whether it had been asked for) of every layer that was entered."""
    seen: list[tuple[int, bool]] = []
    enter = Ring.enter

    def watch(ring: Ring, layer: int) -> float:
        before = ring.misses
        waited = enter(ring, layer)
        seen.append((layer, ring.misses == before))
        return waited

    monkeypatch.setattr(Ring, "enter", watch)
    return seen


def streaming(folder: Path) -> DiffGenerator:
    return DiffGenerator.from_pretrained(str(folder), offload="layerwise", threads=1)


def test_the_second_expert_is_on_its_way_before_the_boundary(tmp_path: Path, watched: list[tuple[int, bool]]) -> None:
    with streaming(make_wan(tmp_path, "t2v_a14b", layers=4)) as gen:
        gen.generate(PROMPT, output_type="latent", guidance_scale=1.0, **VIDEO)
        steps = [(layer, ahead) for layer, ahead in watched if layer < 8]
        assert [layer for layer, _ in steps] == [0, 1, 2, 3] * 2 + [4, 5, 6, 7] * 4, "two steps, then four"
        assert all(ahead for _, ahead in steps), "a layer that computes next had not been asked for"
        del watched[:]
        gen.generate(PROMPT, output_type="latent", guidance_scale=1.0, **{**VIDEO, "seed": 2})
        assert all(ahead for _, ahead in watched), "after the last step the first expert is on its way again"
        assert isinstance(gen._engine, LocalEngine)
        plan = gen._engine.core.pipeline.memory.plan
        assert plan is not None
        assert plan.slots == 2, "for both experts together"


def test_an_image_goes_from_its_prompt_to_its_steps_without_a_miss(
    tmp_path: Path, watched: list[tuple[int, bool]]
) -> None:
    with streaming(make_z_image(tmp_path / "z", layers=5)) as gen:
        gen.generate(PROMPT, output_type="latent", **IMAGE)
    assert [ahead for _, ahead in watched].count(False) == 1, "only the very first layer is not there"


def test_a_change_of_one_expert_leaves_the_other_s_layers_where_they_are(tmp_path: Path) -> None:
    folder = make_wan(tmp_path / "wan", "t2v_a14b", layers=4)
    with streaming(folder) as gen:
        assert isinstance(gen._engine, LocalEngine)
        memory = gen._engine.core.pipeline.memory
        assert memory._stream is not None
        ring, trees = memory._stream._ring, gen._engine.core.pipeline.trees
        gen.generate(PROMPT, output_type="latent", guidance_scale=1.0, **{**VIDEO, "num_inference_steps": 1})
        held = list(ring._held)
        assert all(layer is not None and layer < 4 for layer in held), "the first expert's"
        trees["transformer_2"].alter({}, frozenset(trees["transformer_2"].places))
        assert ring._held == held
        trees["transformer"].alter({}, frozenset(trees["transformer"].places))
        assert ring._held == [None, None]


@pytest.mark.parametrize("offload", ["none", "layerwise", "component"])
def test_whoever_lets_go_of_a_model_has_its_memory_back_at_once(tmp_path: Path, offload: str) -> None:
    gen = DiffGenerator.from_pretrained(str(make_z_image(tmp_path / "z")), offload=offload, threads=1)
    gen.generate(PROMPT, output_type="latent", **IMAGE)
    assert isinstance(gen._engine, LocalEngine)
    model = weakref.ref(gen._engine.core.pipeline.trees["transformer"].model)
    gc.collect()
    gc.disable()
    try:
        gen.close()
        assert model() is None, "kept until the collector of cycles comes by"
    finally:
        gc.enable()
