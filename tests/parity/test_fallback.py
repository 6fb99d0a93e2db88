"""A family that has no native code here runs through diffusers, behind the same engine."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multimodal_gen import DiffGenerator
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.core import EngineCore
from multimodal_gen.errors import ConfigError, UnsupportedParameter
from multimodal_gen.media.arrays import to_numpy
from multimodal_gen.messages import Failed, Finished, Progress
from multimodal_gen.pipelines import registry
from multimodal_gen.pipelines.diffusers_any import signature
from multimodal_gen.request import SamplingParams
from multimodal_gen.resolve import resolve
from tests.support.checkpoints import PROMPT

pytestmark = [pytest.mark.parity]

SMALL: dict[str, Any] = {"width": 64, "height": 96, "num_inference_steps": 4, "guidance_scale": 2.0}


def diffusers_image(pipe: Any, *, seed: int, **options: Any) -> np.ndarray:
    noise = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(PROMPT, generator=noise, **options).images[0])


def threads() -> int:
    return sum(thread.name == "diffusers-call" for thread in threading.enumerate())


@pytest.mark.parametrize(
    "options",
    [{}, {"width": 96, "height": 64}, {"num_inference_steps": 1}, {"max_sequence_length": 32}],
    ids=str,
)
def test_images_equal_diffusers(
    flux1_folder: Path,
    generator: Callable[..., DiffGenerator],
    reference: Callable[..., Any],
    options: dict[str, Any],
) -> None:
    settings = {**SMALL, **options}
    got = generator(flux1_folder).generate(PROMPT, output_type="np", seed=8, num_outputs_per_prompt=2, **settings)
    for image, seed in zip(got.images, (8, 9), strict=True):
        assert np.array_equal(image, diffusers_image(reference(flux1_folder), seed=seed, **settings))
    assert not np.array_equal(got.images[0], got.images[1])
    assert threads() == 0


def test_every_step_is_reported_once(flux1_folder: Path, generator: Callable[..., DiffGenerator]) -> None:
    seen: list[Progress] = []
    generator(flux1_folder).generate(PROMPT, seed=1, num_outputs_per_prompt=2, on_step=seen.append, **SMALL)
    # One row at a time: the first image is finished before the second begins.
    assert [(p.index, p.step, p.steps) for p in seen] == [(i, s, 4) for i in (0, 1) for s in (1, 2, 3, 4)]


def test_a_list_of_prompts_keeps_its_order(flux1_folder: Path, generator: Callable[..., DiffGenerator]) -> None:
    gen = generator(flux1_folder)
    both = gen.generate([PROMPT, "one green apple"], output_type="np", seed=3, **SMALL)
    for result in both:
        alone = gen.generate(result.prompt, output_type="np", seed=3, **SMALL)
        assert np.array_equal(result.images[0], alone.images[0])
    assert [result.prompt for result in both] == [PROMPT, "one green apple"]


@pytest.fixture
def core(flux1_folder: Path) -> EngineCore:
    config = EngineConfig(model_path=str(flux1_folder), device="cpu", dtype="float32")
    return EngineCore(registry.describe(config), config)


def add(core: EngineCore, name: str, **params: Any) -> None:
    settings = SamplingParams(**{**SMALL, "seed": 5, **params})
    core.add(resolve(request_id=name, prompt=PROMPT, params=settings, card=core.pipeline.card, max_cost=10**9))


def finish(core: EngineCore) -> dict[str, np.ndarray]:
    images: dict[str, np.ndarray] = {}
    while not core.idle:
        for event in core.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                images[event.request_id] = to_numpy(event.outputs[0])
    return images


@pytest.mark.parametrize("after", [0, 1, 3])
def test_cancelling_midway_ends_the_thread_and_the_next_request_is_fine(
    core: EngineCore, flux1_folder: Path, reference: Callable[..., Any], after: int
) -> None:
    add(core, "first", num_inference_steps=6, seed=1)
    for _ in range(after):
        list(core.step())
    add(core, "second")
    assert threads() == min(after, 1)
    (failed,) = core.cancel("first")
    assert isinstance(failed, Failed)
    assert failed.error.code == "cancelled"
    assert threads() == 0
    images = finish(core)
    assert list(images) == ["second"]
    assert np.array_equal(images["second"], diffusers_image(reference(flux1_folder), seed=5, **SMALL))


@pytest.mark.parametrize("step", [0, 2])
def test_an_error_inside_diffusers_is_the_answer_of_that_request(core: EngineCore, step: int) -> None:
    add(core, "good")
    good = finish(core)["good"]
    calls = 0

    def explode(module: torch.nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > step:
            raise RuntimeError("secret /path/of/the/server")

    hook = core.pipeline.pipe.transformer.register_forward_pre_hook(explode)  # type: ignore[attr-defined]
    add(core, "bad")
    failures = [e for _ in range(step + 1) for e in core.step() if isinstance(e, Failed)]
    hook.remove()
    assert [f.error.code for f in failures] == ["generation_failed"]
    assert "secret" not in failures[0].error.message
    assert threads() == 0
    add(core, "again")
    assert np.array_equal(finish(core)["again"], good)


@pytest.mark.parametrize("options", [{"negative_prompt": "x"}, {"cfg_truncation": 0.5}], ids=str)
def test_what_the_class_does_not_use_is_refused(
    flux1_folder: Path, generator: Callable[..., DiffGenerator], options: dict[str, Any]
) -> None:
    """FluxPipeline takes a negative prompt and ignores it unless it is given another scale: that is no use of it."""
    with pytest.raises(UnsupportedParameter) as caught:
        generator(flux1_folder).generate(PROMPT, **SMALL, **options)
    assert caught.value.param in options


def test_latents_are_refused(flux1_folder: Path, generator: Callable[..., DiffGenerator]) -> None:
    with pytest.raises(UnsupportedParameter, match="no latents"):
        generator(flux1_folder).generate(PROMPT, output_type="latent", **SMALL)


@pytest.mark.parametrize(
    ("name", "value"), [("offload", "layerwise"), ("device_memory_limit", 10**12), ("prefetch_layers", "2")]
)
def test_weights_cannot_be_placed(flux1_folder: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")) as caught:
        DiffGenerator.from_pretrained(str(flux1_folder), **{name: value})
    assert caught.value.param == name


def test_an_attention_backend_would_have_no_effect(flux1_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--attention-backend"):
        DiffGenerator.from_pretrained(str(flux1_folder), device="cpu", attention_backend="sdpa")


def test_the_source_text_agrees_with_the_imported_class() -> None:
    from diffusers import FluxPipeline, StableDiffusionXLPipeline

    for pipeline in (FluxPipeline, StableDiffusionXLPipeline):
        read = signature.read(pipeline.__name__)
        assert read is not None
        real = {n: p for n, p in inspect.signature(pipeline.__call__).parameters.items() if n != "self"}
        assert set(read.defaults) | set(read.required) == {n for n, p in real.items() if p.kind != p.VAR_KEYWORD}
        for name in ("num_inference_steps", "guidance_scale", "output_type"):
            assert read.defaults[name] == real[name].default


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_solver_that_takes_more_steps_than_were_asked_for(
    stable_diffusion_folder: Path, generator: Callable[..., DiffGenerator], reference: Callable[..., Any], steps: int
) -> None:
    settings = {"width": 48, "height": 64, "num_inference_steps": steps, "guidance_scale": 5.0, "negative_prompt": "x"}
    seen: list[Progress] = []
    got = generator(stable_diffusion_folder).generate(PROMPT, output_type="np", seed=4, on_step=seen.append, **settings)
    assert [p.step for p in seen] == list(range(1, steps + 1))
    assert np.array_equal(got.images[0], diffusers_image(reference(stable_diffusion_folder), seed=4, **settings))
    assert threads() == 0
