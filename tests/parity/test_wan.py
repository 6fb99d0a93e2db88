"""Whole runs of the native Wan family against diffusers' pipelines on the same files, in float32 on the CPU."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal_gen import DiffGenerator
from multimodal_gen.config import EngineConfig
from multimodal_gen.memory.residency import Memory
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.pipelines.contract import whole
from multimodal_gen.pipelines.registry import describe
from multimodal_gen.pipelines.vaes.wan import WanVae
from tests.support.checkpoints import NEGATIVE, PROMPT
from tests.support.device import DEVICE, ON_CPU, within
from tests.support.wan_checkpoints import VARIANTS

pytestmark = [pytest.mark.parity]

TOLERANCE = within(1e-4)  # largest difference of a latent after all steps
STEPS = 5
LONG = " ".join([PROMPT] * 20)
# Another prompt length for each branch, more latent frames than one, an odd number of patches.
BASE: dict[str, Any] = {"width": 96, "height": 64, "num_frames": 9, "guidance_scale": 4.0, "negative_prompt": NEGATIVE}


def picture(width: int = 96, height: int = 64) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ours(gen: DiffGenerator, prompt: str = PROMPT, **options: Any) -> torch.Tensor:
    if "image" in options:
        options["image"] = png(options["image"])
    result = gen.generate(prompt, output_type="latent", **{"num_inference_steps": STEPS, **options})
    assert result.latents is not None
    return result.latents


def theirs(pipe: Any, prompt: str = PROMPT, *, seed: int, **options: Any) -> torch.Tensor:
    latents: torch.Tensor = pipe(
        prompt=prompt,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_dict=False,
        **{"num_inference_steps": STEPS, **options},
    )[0]
    return latents


def image_pipe(pipe: Any) -> Any:
    """The TI2V folder as diffusers runs it from a picture."""
    from diffusers import WanImageToVideoPipeline

    made = WanImageToVideoPipeline(**pipe.components, expand_timesteps=True, image_encoder=None, image_processor=None)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def compare(generator: Callable[..., DiffGenerator], reference: Callable[..., Any]) -> Callable[..., None]:
    def check(folder: Path, prompt: str = PROMPT, *, seed: int = 0, **options: Any) -> None:
        pipe = reference(folder)
        if "image" in options and type(pipe).__name__ == "WanPipeline":
            pipe = image_pipe(pipe)
        got = ours(generator(folder), prompt, seed=seed, **options)
        want = theirs(pipe, prompt, seed=seed, **options)
        assert got.shape == want.shape
        difference = (got - want).abs()
        assert float(difference.max()) <= TOLERANCE, f"max {difference.max():.2e}, mean {difference.mean():.2e}"

    return check


def inputs(variant: str) -> dict[str, Any]:
    """What a call of this variant needs."""
    options = dict(BASE)
    if variant.startswith("i2v"):
        options["image"] = picture()
    if variant.endswith("a14b"):
        options["guidance_scale_2"] = 3.0
    return options


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"seed": 2**40 + 1, "width": 64, "height": 96, "num_frames": 5},
        {"seed": 3, "width": 160, "height": 64, "num_frames": 1},
        {"seed": 4, "guidance_scale": 1.0, "negative_prompt": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_solvers_sizes_and_seeds(
    wan_folder: Callable[..., Path], compare: Callable[..., None], variant: str, change: dict[str, Any], solver: str
) -> None:
    options = {**inputs(variant), **change}
    if options["guidance_scale"] == 1.0:
        options.pop("guidance_scale_2", None)
    compare(wan_folder(variant=variant, solver=solver), **options)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_the_5b_model_starts_from_a_picture(
    wan_folder: Callable[..., Path], compare: Callable[..., None], solver: str
) -> None:
    folder = wan_folder(variant="ti2v_5b", solver=solver)
    compare(folder, **BASE, image=picture(), seed=5)
    compare(folder, **{**BASE, "width": 64, "height": 128}, image=picture(40, 90), seed=6)


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 1.0, "negative_prompt": None},
        {"negative_prompt": None},
        {"negative_prompt": LONG},
        {"max_sequence_length": 40, "negative_prompt": LONG},
        {"num_inference_steps": 1},
        {"num_inference_steps": 12},
        {"num_frames": 1},
        {"num_frames": 33},
    ],
    ids=str,
)
def test_options(wan_folder: Callable[..., Path], compare: Callable[..., None], change: dict[str, Any]) -> None:
    compare(wan_folder(variant="t2v"), seed=3, **{**BASE, **change})


@pytest.mark.parametrize(
    "prompt",
    ["x", LONG, "ünïcode &amp;amp; 猫 🐈  </s>", "a\nb\tc  d", "schÃ¶n"],
    ids=["x", "long", "odd", "ws", "mojibake"],
)
def test_prompts(wan_folder: Callable[..., Path], compare: Callable[..., None], prompt: str) -> None:
    compare(wan_folder(variant="t2v"), prompt, seed=1, **BASE)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"seed": 11, "shift": 5.0},
        {"heads": 2, "head_dim": 48, "seed": 1},
        {"heads": 3, "head_dim": 32, "layers": 3, "ffn": 100, "seed": 2},
        {"heads": 1, "head_dim": 128, "layers": 1, "seed": 4},
        {"max_shard_size": "300KB", "seed": 5},
        {"variant": "t2v_a14b", "boundary": 0.5, "seed": 6},
        {"variant": "i2v", "heads": 2, "head_dim": 20, "seed": 7},
    ],
    ids=str,
)
def test_other_checkpoints(
    wan_folder: Callable[..., Path], compare: Callable[..., None], checkpoint: dict[str, Any]
) -> None:
    folder = wan_folder(**{"variant": "t2v", **checkpoint})
    if "max_shard_size" in checkpoint:
        assert len(list(folder.glob("transformer/*.safetensors"))) > 2
    compare(folder, seed=9, **inputs(checkpoint.get("variant", "t2v")))


def test_flow_shift_replaces_the_checkpoints(wan_folder: Callable[..., Path], generator: Callable[..., Any]) -> None:
    plain, shifted = wan_folder(variant="t2v", shift=3.0), wan_folder(variant="t2v", shift=7.0)
    want = ours(generator(shifted), seed=2, **BASE)
    got = ours(generator(plain), seed=2, flow_shift=7.0, **BASE)
    assert torch.equal(got, want)
    assert not torch.equal(got, ours(generator(plain), seed=2, **BASE))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_no_worse_than_the_reference(wan_folder: Callable[..., Path], variant: str) -> None:
    """The error of a bfloat16 run against float32, ours beside diffusers' own, summed over seeds."""
    from diffusers import DiffusionPipeline

    folder, options = wan_folder(variant=variant), inputs(variant)
    by_part = {"default": torch.bfloat16, "vae": torch.float32}
    half_theirs = DiffusionPipeline.from_pretrained(folder, dtype=by_part, local_files_only=True)
    whole = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    error = {"ours": 0.0, "theirs": 0.0}
    with DiffGenerator.from_pretrained(str(folder), device=DEVICE, dtype="bfloat16") as gen:
        for seed in range(4):
            want = theirs(whole, seed=seed, **options)
            error["ours"] += float((ours(gen, seed=seed, **options) - want).norm() / want.norm())
            error["theirs"] += float((theirs(half_theirs, seed=seed, **options).float() - want).norm() / want.norm())
    assert error["ours"] <= 1.1 * error["theirs"], error


@pytest.mark.parametrize("variant", ["t2v", "ti2v_5b"])
def test_pixels(wan_folder: Callable[..., Path], generator: Callable[..., Any], reference: Any, variant: str) -> None:
    folder = wan_folder(variant=variant)
    options = {**BASE, "num_inference_steps": STEPS}
    got = generator(folder).generate(PROMPT, seed=1, output_type="np", **options).frames
    noise = torch.Generator().manual_seed(1)
    want = reference(folder)(prompt=PROMPT, generator=noise, output_type="np", return_dict=False, **options)[0]
    assert got.shape == (1, 9, 64, 96, 3)
    assert got.dtype == np.uint8
    assert want.std() > 0.01
    assert np.abs(got.astype(float) - want * 255).max() <= 1.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_input_moves_the_latents(
    wan_folder: Callable[..., Path], generator: Callable[..., Any], variant: str
) -> None:
    """What the comparisons above rest on: a wrong input would show far above the tolerance."""
    gen, base = generator(wan_folder(variant=variant)), inputs(variant)
    latents = ours(gen, seed=1, **base)
    changes: list[dict[str, Any]] = [{"prompt": PROMPT + " x"}, {"guidance_scale": 3.0}, {"negative_prompt": "dark"}]
    changes += [{"guidance_scale_2": 2.0}] if "guidance_scale_2" in base else []
    changes += [{"image": picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)}] if "image" in base else []
    for change in changes:
        other = ours(gen, **{"prompt": PROMPT, "seed": 1, **base, **change})
        assert float((latents - other).abs().max()) > (50 if ON_CPU else 20) * TOLERANCE, change


def vae_of(folder: Path, *, tiled: bool = False) -> WanVae:
    memory = Memory(EngineConfig(), torch.device("cpu"), folder, Mesh.solo())
    vae = WanVae(folder, [folder / "diffusion_pytorch_model.safetensors"], torch.device("cpu"), memory, tiled=tiled)
    memory.load(describe(EngineConfig(model_path=str(folder.parent))), torch.float32, lambda *_: {})
    return vae


def latents_of(vae: WanVae, width: int, height: int) -> torch.Tensor:
    side = 8 * vae.vae.patch
    sizes = (len(vae.mean), 3, height // side, width // side)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", ["t2v", "ti2v_5b"])
def test_the_vae_decodes_and_encodes_as_that_of_diffusers(wan_folder: Callable[..., Path], variant: str) -> None:
    from diffusers import AutoencoderKLWan

    folder = wan_folder(variant=variant) / "vae"
    ours, theirs = vae_of(folder), AutoencoderKLWan.from_pretrained(folder)
    latents = latents_of(ours, 96, 64)
    with torch.inference_mode():
        frames = whole(ours.decode(latents))
        want = theirs.decode((latents / (1.0 / ours.std) + ours.mean)[None]).sample[0]
        moments = theirs.encode(want[None]).latent_dist.mode()[0]
        encoded = ours.encode(want)
    assert frames.shape == (9, 64, 96, 3)
    exact = (want * 0.5 + 0.5).clamp(0, 1).mul(255).permute(1, 2, 3, 0).numpy()
    assert np.abs(frames - exact).max() <= 0.5 + 255 * TOLERANCE
    assert float((encoded - (moments - ours.mean) / ours.std).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("variant", ["t2v", "ti2v_5b"])
def test_frames_from_tiles_are_those_from_the_whole(wan_folder: Callable[..., Path], variant: str) -> None:
    folder = wan_folder(variant=variant) / "vae"
    tiled, plain = vae_of(folder, tiled=True), vae_of(folder)
    # Two tiles and a half, of 256 pixels for the one and of 512 for the other; half of them at an edge.
    latents = latents_of(tiled, *((624, 280) if variant == "t2v" else (1264, 544)))
    with torch.inference_mode():
        apart, together = whole(tiled.decode(latents)), whole(plain.decode(latents))
    assert np.abs(apart.astype(int) - together.astype(int)).max() <= 1
    assert (apart != together).mean() < 1e-3
