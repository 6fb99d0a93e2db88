"""Whole runs of the native Z-Image against diffusers' ZImagePipeline on the same files, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multimodal_gen import DiffGenerator
from multimodal_gen.weights.hub import ASSETS
from tests.support.checkpoints import NEGATIVE, PROMPT
from tests.support.device import within

pytestmark = [pytest.mark.parity]

TOLERANCE = within(1e-4)  # largest difference of a latent after all steps
STEPS = 4
LONG = " ".join([PROMPT] * 5)  # more than one padded block of 32 tokens


def ours(gen: DiffGenerator, prompt: str, **options: Any) -> torch.Tensor:
    result = gen.generate(prompt, output_type="latent", **{"num_inference_steps": STEPS, **options})
    assert result.latents is not None
    return result.latents


def theirs(pipe: Any, prompt: str, *, seed: int, num_outputs_per_prompt: int = 1, **options: Any) -> torch.Tensor:
    latents: torch.Tensor = pipe(
        prompt,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(num_outputs_per_prompt)],
        num_images_per_prompt=num_outputs_per_prompt,
        output_type="latent",
        return_dict=False,
        **{"num_inference_steps": STEPS, **options},
    )[0]
    return latents


@pytest.fixture
def compare(generator: Callable[..., DiffGenerator], reference: Callable[..., Any]) -> Callable[..., None]:
    def check(folder: Path, prompt: str = PROMPT, **options: Any) -> None:
        got, want = ours(generator(folder), prompt, **options), theirs(reference(folder), prompt, **options)
        assert got.shape == want.shape
        difference = (got - want).abs()
        assert float(difference.max()) <= TOLERANCE, f"max {difference.max():.2e}, mean {difference.mean():.2e}"

    return check


@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (64, 96), (96, 48), (80, 112), (32, 160)])
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 1])
def test_sizes_seeds_and_guidance(
    z_image_folder: Callable[..., Path],
    compare: Callable[..., None],
    seed: int,
    width: int,
    height: int,
    guidance_scale: float,
) -> None:
    compare(z_image_folder(), seed=seed, width=width, height=height, guidance_scale=guidance_scale)


@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 48)])
def test_three_images_of_one_prompt(
    z_image_folder: Callable[..., Path],
    compare: Callable[..., None],
    width: int,
    height: int,
    guidance_scale: float,
) -> None:
    compare(
        z_image_folder(), seed=5, width=width, height=height, guidance_scale=guidance_scale, num_outputs_per_prompt=3
    )


@pytest.mark.parametrize(
    "options",
    [
        {"cfg_normalization": 0.5},
        {"cfg_normalization": 1.0},
        {"cfg_truncation": 0.4},
        {"cfg_truncation": 0.0},
        {"cfg_truncation": None},
        {"cfg_normalization": 0.7, "cfg_truncation": 0.5, "num_outputs_per_prompt": 2},
        {"negative_prompt": ""},
        {"negative_prompt": NEGATIVE},
        {"negative_prompt": LONG},
        {"guidance_scale": 0.5},
        {"max_sequence_length": 24, "negative_prompt": LONG},
        {"num_inference_steps": 1},
        {"num_inference_steps": 9},
    ],
    ids=str,
)
def test_options(z_image_folder: Callable[..., Path], compare: Callable[..., None], options: dict[str, Any]) -> None:
    compare(z_image_folder(), **{"seed": 3, "width": 64, "height": 80, "guidance_scale": 4.0, **options})


@pytest.mark.parametrize(
    "prompt", ["x", LONG, "üñïçødé 猫 🐈 <|im_end|> <think>", "a\nb\tc  d"], ids=["x", "long", "odd", "ws"]
)
def test_prompts(z_image_folder: Callable[..., Path], compare: Callable[..., None], prompt: str) -> None:
    compare(z_image_folder(), prompt, seed=1, width=64, height=64, guidance_scale=4.0)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"seed": 11},
        {"heads": 2, "head_dim": 48, "seed": 1},
        {"heads": 3, "head_dim": 24, "layers": 3, "refiner_layers": 2, "seed": 2},
        {"heads": 5, "head_dim": 12, "text_width": 64, "shift": 6.0, "seed": 3},
        {"heads": 1, "head_dim": 96, "layers": 1, "seed": 4},
        {"max_shard_size": "700KB", "seed": 5},
    ],
    ids=str,
)
def test_other_checkpoints(
    z_image_folder: Callable[..., Path], compare: Callable[..., None], checkpoint: dict[str, Any]
) -> None:
    folder = z_image_folder(**checkpoint)
    if "max_shard_size" in checkpoint:
        assert len(list(folder.glob("transformer/*.safetensors"))) > 2
    compare(folder, seed=9, width=96, height=64, guidance_scale=4.0, num_outputs_per_prompt=2)


def test_the_tiny_checkpoint_can_tell(
    z_image_folder: Callable[..., Path], generator: Callable[..., DiffGenerator]
) -> None:
    """What the comparisons above rest on: every input moves the latents by far more than the tolerance."""
    gen = generator(z_image_folder())
    base = {"seed": 3, "width": 64, "height": 64, "guidance_scale": 4.0}
    latents = ours(gen, PROMPT, **base)
    for change in ({"prompt": PROMPT + "!"}, {"guidance_scale": 3.9}, {"negative_prompt": NEGATIVE}, {"seed": 4}):
        other = ours(gen, **{"prompt": PROMPT, **base, **change})
        assert float((latents - other).abs().max()) > 100 * TOLERANCE, change


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("red apple on a blue background", {"seed": 7}),
        ("rocket and racing car", {"seed": 1, "width": 160, "height": 96, "num_inference_steps": 8}),
        ("a small heart at the top left", {"seed": 2, "guidance_scale": 0.0, "num_inference_steps": 8}),
    ],
)
def test_emoji_images(
    generator: Callable[..., DiffGenerator], reference: Callable[..., Any], prompt: str, options: dict[str, Any]
) -> None:
    settings = {"width": 128, "height": 128, "num_inference_steps": 20, "guidance_scale": 3.0, **options}
    got = generator("emoji-image").generate(prompt, output_type="np", **settings).images[0]
    noise = torch.Generator().manual_seed(settings.pop("seed"))
    want = np.asarray(reference(ASSETS / "emoji-image")(prompt, generator=noise, **settings).images[0])
    assert want.std() > 10  # a picture, no flat field
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1
