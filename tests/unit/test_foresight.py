"""What is fetched ahead of the layer that computes: across passes, models and experts."""

from __future__ import annotations

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
