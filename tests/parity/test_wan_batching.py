"""Videos that share forwards, pause, move to another engine, or keep their text: results do not depend on it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.core import EngineCore
from multimodal_gen.messages import Checkpoint, Failed, RowState
from multimodal_gen.pipelines import registry
from multimodal_gen.pipelines.wan.model import WanTransformer
from multimodal_gen.pipelines.wan.pipeline import WanPipeline
from multimodal_gen.request import SamplingParams, VideoRequest
from multimodal_gen.resolve import resolve
from tests.support.checkpoints import NEGATIVE, PROMPT
from tests.support.device import DEVICE
from tests.support.stepping import note, run
from tests.support.wan_checkpoints import VARIANTS

pytestmark = [pytest.mark.parity]

# (step at which it arrives, parameters): other sizes, lengths, steps, guidance, prompts
OTHERS: list[tuple[int, dict[str, Any]]] = [
    (0, {"width": 64, "height": 64, "num_frames": 1, "num_inference_steps": 2, "guidance_scale": 1.0}),
    (0, {"width": 96, "height": 64, "num_frames": 5, "num_inference_steps": 7}),
    (1, {"width": 64, "height": 96, "num_inference_steps": 3, "negative_prompt": NEGATIVE}),
    (2, {"width": 64, "height": 64, "num_frames": 13, "num_inference_steps": 2, "prompt": "x"}),
    (3, {"width": 64, "height": 64, "num_inference_steps": 5, "num_outputs_per_prompt": 2}),
]
TARGET = {"width": 96, "height": 64, "num_inference_steps": 8, "seed": 21}


def engine(folder: Path, **options: Any) -> EngineCore:
    config = EngineConfig(model_path=str(folder), device=DEVICE, **{"dtype": "float32", **options})
    return EngineCore(registry.describe(config), config)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def request(core: EngineCore, name: str, *, prompt: str = PROMPT, every: int = 0, **params: Any) -> VideoRequest:
    card = core.pipeline.card
    assert card.video is not None
    given = {"num_frames": 9, "guidance_scale": 4.0, "seed": 1, **params}
    if card.video.image == "required" or (card.video.image == "optional" and given["seed"] % 2):
        given["image"] = picture(given["seed"])
    made = resolve(
        request_id=name,
        prompt=prompt,
        params=SamplingParams(**given),
        card=card,
        max_cost=10**9,
        output="latent",
        checkpoint_every=every,
    )
    assert isinstance(made, VideoRequest)
    return made


def alone_and_together(core: EngineCore) -> tuple[np.ndarray, np.ndarray]:
    others = [(when, request(core, f"other-{i}", **params)) for i, (when, params) in enumerate(OTHERS)]
    alone, rows = run(core, [(0, request(core, "target", **TARGET))])
    assert rows == [1] * 8
    together, rows = run(core, [*others, (1, request(core, "target", **TARGET))])
    assert len(together) == len(OTHERS) + 1
    assert max(rows) >= 4
    return alone["target"], together["target"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_neighbours_change_nothing_beyond_rounding(wan_folder: Callable[..., Path], variant: str) -> None:
    alone, together = alone_and_together(engine(wan_folder(variant=variant)))
    assert np.abs(alone - together).max() <= 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["i2v", "t2v_a14b", "ti2v_5b"])
def test_deterministic_is_bit_equal(wan_folder: Callable[..., Path], variant: str, dtype: str) -> None:
    alone, together = alone_and_together(engine(wan_folder(variant=variant), dtype=dtype, deterministic=True))
    assert np.array_equal(alone, together)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_read_at_every_step_gives_the_same_bits(wan_folder: Callable[..., Path], variant: str) -> None:
    kept, read = (engine(wan_folder(variant=variant), text_kv_cache=keep) for keep in (True, False))
    results = [run(core, [(0, request(core, "target", **TARGET))])[0]["target"] for core in (kept, read)]
    assert np.array_equal(*results)


def test_a_text_is_read_once_for_all_videos_of_a_request(
    wan_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they start at different steps; the last one frees it."""
    core = engine(wan_folder(variant="t2v"), max_batch_tokens=1)  # one row at a time
    reads = []
    read = WanTransformer.read
    monkeypatch.setattr(WanTransformer, "read", lambda *given, keep: reads.append(1) or read(*given, keep=keep))
    _, rows = run(core, [(0, request(core, "three", num_outputs_per_prompt=3, **TARGET))])
    assert max(rows) == 1
    assert len(reads) == 2  # the prompt and the negative prompt
    assert isinstance(core.pipeline, WanPipeline)
    assert not core.pipeline.conditions


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_goes_on_in_another_engine_bit_for_bit(
    wan_folder: Callable[..., Path], variant: str, solver: str
) -> None:
    """Every checkpoint of a run of two videos, each taken up by a fresh engine; the boundary of A14B lies inside."""
    first = engine(wan_folder(variant=variant, solver=solver), deterministic=True)
    wanted = request(first, "target", every=2, num_outputs_per_prompt=2, **TARGET)
    states: dict[int, dict[int, RowState]] = {}
    latents: dict[str, np.ndarray] = {}
    first.add(wanted)
    while not first.idle:
        for event in first.step():
            note(event, latents, [])
            if isinstance(event, Checkpoint):
                states.setdefault(event.state.step, {})[event.state.index] = event.state
    assert sorted(states) == [2, 4, 6]
    for step, rows in states.items():
        other = engine(wan_folder(variant=variant, solver=solver), deterministic=True)
        other.add(wanted, list(rows.values()))
        again: dict[str, np.ndarray] = {}
        steps = 0
        while not other.idle:
            for event in other.step():
                note(event, again, [])
            steps += 1
        assert steps == 8 - step
        assert np.array_equal(again["target"], latents["target"]), step


def test_leaving_midway_leaves_no_trace(wan_folder: Callable[..., Path]) -> None:
    core = engine(wan_folder(variant="t2v"), deterministic=True)
    alone, _ = run(core, [(0, request(core, "target", **TARGET))])
    core.add(request(core, "target", **TARGET))
    core.add(request(core, "leaver", width=96, height=96, num_inference_steps=50))
    latents: dict[str, np.ndarray] = {}
    for _ in range(3):
        for event in core.step():
            note(event, latents, [])
    (failed,) = core.cancel("leaver")
    assert isinstance(failed, Failed)
    while not core.idle:
        for event in core.step():
            note(event, latents, [])
    assert np.array_equal(latents["target"], alone["target"])
