"""What the diffusers fallback says of a folder, from its files and diffusers' source text alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from multimodal_gen.errors import ConfigError
from multimodal_gen.pipelines.diffusers_any import signature
from multimodal_gen.pipelines.diffusers_any.spec import describe, guidance_argument, takes_negative
from multimodal_gen.request import ModelCard
from tests.support.folders import write_json, write_model

pytestmark = [pytest.mark.unit]


def card(tmp_path: Path, pipeline_class: str) -> ModelCard:
    return describe("mine", write_model(tmp_path / "mine", pipeline_class))


def test_flux_takes_its_defaults_from_diffusers(tmp_path: Path) -> None:
    found = card(tmp_path, "FluxPipeline")
    assert (found.defaults.width, found.defaults.height) == (1024, 1024)
    assert (found.defaults.num_inference_steps, found.defaults.guidance_scale) == (28, 3.5)
    assert found.defaults.max_sequence_length == found.max_sequence_length == 512
    assert (found.size_multiple, found.pixels_per_token) == (16, 256)
    assert found.exclusive
    assert not found.previews
    assert not found.latents
    assert "negative_prompt" not in found.parameters  # it would act only next to true_cfg_scale
    assert found.guidance_threshold >= 100  # distilled: never a second forward
    assert {"seed", "width", "guidance_scale", "max_sequence_length"} <= found.parameters
    assert "cfg_normalization" not in found.parameters


def test_stable_diffusion_takes_its_size_from_the_unet(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mine", "StableDiffusionPipeline")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    write_json(folder / "unet" / "config.json", {"sample_size": 96})
    found = describe("mine", folder)
    assert (found.defaults.width, found.defaults.height, found.pixels_per_token) == (768, 768, 64)
    assert (found.defaults.guidance_scale, found.guidance_threshold) == (7.5, 1.0)
    assert "negative_prompt" in found.parameters
    assert "max_sequence_length" not in found.parameters


def test_guidance_means_true_cfg_where_guidance_scale_is_for_distilled_models() -> None:
    qwen, flux = signature.read("QwenImagePipeline"), signature.read("FluxPipeline")
    assert qwen is not None
    assert flux is not None
    assert (guidance_argument(qwen), takes_negative(qwen)) == ("true_cfg_scale", True)
    assert (guidance_argument(flux), takes_negative(flux)) == ("guidance_scale", False)


@pytest.mark.parametrize(
    "pipeline_class",
    [
        "StableDiffusion3Pipeline",
        "SanaPipeline",
        "PixArtSigmaPipeline",
        "KolorsPipeline",
        "Flux2Pipeline",
        "AuraFlowPipeline",
    ],
)
def test_text_to_image_classes_are_described(tmp_path: Path, pipeline_class: str) -> None:
    found = card(tmp_path, pipeline_class)
    assert found.pipeline_class == pipeline_class
    assert found.defaults.width % found.size_multiple == 0


@pytest.mark.parametrize(
    ("pipeline_class", "why"),
    [
        ("FluxImg2ImgPipeline", "'Img2Img' in its name"),
        ("StableDiffusionInpaintPipeline", "'Inpaint' in its name"),
        ("StableDiffusionXLControlNetPipeline", "'Control' in its name"),
        ("QwenImageEditPlusPipeline", "'Edit' in its name"),
        ("StableDiffusionUpscalePipeline", "'Upscale' in its name"),
        ("WanPipeline", "num_frames"),
        ("LTXPipeline", "num_frames"),
        ("WanImageToVideoPipeline", "in its name"),
        ("AudioLDM2Pipeline", "in its name"),
        ("DiTPipeline", "needs 'class_labels' besides a prompt"),
        ("DDPMPipeline", "does not make images"),
        ("NoSuchPipeline", "not in the installed diffusers"),
    ],
)
def test_other_classes_are_refused_by_name(tmp_path: Path, pipeline_class: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        card(tmp_path, pipeline_class)
    assert pipeline_class in caught.value.message
