"""A row's result does not depend on who shares its batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.core import EngineCore
from multimodal_gen.messages import Failed
from multimodal_gen.pipelines import registry
from multimodal_gen.request import ImageRequest, SamplingParams
from multimodal_gen.resolve import resolve
from tests.support.checkpoints import NEGATIVE, PROMPT
from tests.support.device import DEVICE
from tests.support.stepping import note, run

pytestmark = [pytest.mark.parity]

# (engine step at which it arrives, its settings): some leave before the others join.
OTHERS: list[tuple[int, dict[str, Any]]] = [
    (0, {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 0.0}),
    (0, {"width": 96, "height": 64, "num_inference_steps": 9}),
    (1, {"width": 48, "height": 80, "num_inference_steps": 3, "negative_prompt": NEGATIVE}),
    (2, {"width": 64, "height": 64, "num_inference_steps": 1, "prompt": "x"}),
    (3, {"width": 64, "height": 96, "num_inference_steps": 4, "prompt": " ".join([PROMPT] * 4)}),
    (3, {"width": 112, "height": 32, "num_inference_steps": 5, "guidance_scale": 1.5, "cfg_normalization": 0.5}),
    (5, {"width": 64, "height": 64, "num_inference_steps": 6, "num_outputs_per_prompt": 2}),
]
TARGET = {"width": 64, "height": 80, "num_inference_steps": 8, "guidance_scale": 4.0, "seed": 21}


def engine(folder: Path, **options: Any) -> EngineCore:
    config = EngineConfig(model_path=str(folder), device=DEVICE, **options)
    return EngineCore(registry.describe(config), config)


def request(core: EngineCore, name: str, *, prompt: str = PROMPT, **params: Any) -> ImageRequest:
    return resolve(
        request_id=name,
        prompt=prompt,
        params=SamplingParams(**{"guidance_scale": 4.0, "seed": 1, **params}),
        card=core.pipeline.card,
        max_cost=10**9,
        output="latent",
    )


def alone_and_together(core: EngineCore) -> tuple[np.ndarray, np.ndarray]:
    others = [(when, request(core, f"other-{i}", **params)) for i, (when, params) in enumerate(OTHERS)]
    alone, rows = run(core, [(0, request(core, "target", **TARGET))])
    assert rows == [1] * 8
    together, rows = run(core, [*others, (1, request(core, "target", **TARGET))])
    assert len(together) == len(OTHERS) + 1
    assert max(rows) >= 6
    return alone["target"], together["target"]


@pytest.mark.parametrize("checkpoint", [{}, {"heads": 3, "layers": 3, "seed": 6}], ids=str)
def test_neighbours_change_nothing_beyond_rounding(
    z_image_folder: Callable[..., Path], checkpoint: dict[str, Any]
) -> None:
    alone, together = alone_and_together(engine(z_image_folder(**checkpoint), dtype="float32"))
    assert np.abs(alone - together).max() <= 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpoint", [{}, {"heads": 3, "layers": 3, "seed": 6}], ids=str)
def test_deterministic_is_bit_equal(
    z_image_folder: Callable[..., Path], checkpoint: dict[str, Any], dtype: str
) -> None:
    alone, together = alone_and_together(engine(z_image_folder(**checkpoint), dtype=dtype, deterministic=True))
    assert np.array_equal(alone, together)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_repeat_is_bit_equal(z_image_folder: Callable[..., Path], deterministic: bool) -> None:
    core = engine(z_image_folder(), dtype="float32", deterministic=deterministic)
    others = [(when, request(core, f"other-{i}", **params)) for i, (when, params) in enumerate(OTHERS)]
    first, _ = run(core, others)
    again, _ = run(core, others)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_images_of_one_request_equal_single_requests(z_image_folder: Callable[..., Path]) -> None:
    core = engine(z_image_folder(), dtype="float32")
    many, _ = run(core, [(0, request(core, "many", **{**TARGET, "num_outputs_per_prompt": 3}))])
    for index, seed in enumerate(range(21, 24)):
        one, _ = run(core, [(0, request(core, "one", **{**TARGET, "seed": seed}))])
        assert np.abs(many["many"][index] - one["one"][0]).max() <= 1e-5 * np.abs(one["one"]).max()


def test_a_small_token_budget_changes_the_order_and_no_result(z_image_folder: Callable[..., Path]) -> None:
    wide, narrow = (
        engine(z_image_folder(), dtype="float32", deterministic=True, max_batch_tokens=tokens) for tokens in (4096, 120)
    )
    others = [(when, request(wide, f"other-{i}", **params)) for i, (when, params) in enumerate(OTHERS)]
    (one, wide_rows), (two, narrow_rows) = run(wide, others), run(narrow, others)
    assert max(narrow_rows) < max(wide_rows)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_leaving_midway_leaves_no_trace(z_image_folder: Callable[..., Path]) -> None:
    core = engine(z_image_folder(), dtype="float32", deterministic=True)
    alone, _ = run(core, [(0, request(core, "target", **TARGET))])
    core.add(request(core, "target", **TARGET))
    core.add(request(core, "leaver", width=96, height=96, num_inference_steps=50))
    latents: dict[str, np.ndarray] = {}
    for _ in range(3):
        for event in core.step():
            note(event, latents, [])
    (failed,) = core.cancel("leaver")
    assert isinstance(failed, Failed)
    assert failed.error.code == "cancelled"
    while not core.idle:
        for event in core.step():
            note(event, latents, [])
    assert list(latents) == ["target"]
    assert np.array_equal(latents["target"], alone["target"])
