"""The fallback's description: what a diffusers folder can do here, read from its files and diffusers' source text."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from multimodal_gen.errors import ConfigError
from multimodal_gen.pipelines.contract import Spec
from multimodal_gen.pipelines.diffusers_any import signature
from multimodal_gen.pipelines.diffusers_any.signature import CallSignature
from multimodal_gen.request import MAX_GUIDANCE, Defaults, ModelCard
from multimodal_gen.weights.checkpoint import Index, read_index, read_json

SPEC = Spec(
    family="diffusers",
    title="any other text-to-image pipeline of diffusers, run by diffusers itself, one image at a time",
    pipeline_classes=(),
    pipeline="multimodal_gen.pipelines.diffusers_any.pipeline:DiffusersPipeline",
    describe="multimodal_gen.pipelines.diffusers_any.spec:describe",
)

# Classes whose names say that they start from more than text.
_OTHER_TASKS = re.compile(
    r"Img2Img|Image2Image|ImageToImage|I2I|Inpaint|Edit|Upscale|SuperResolution|Refiner|Control|Adapter|Variation|"
    r"Pix2Pix|Depth|Fill|Redux|Prior|Decoder|Layered|GLIGEN|Video|I2V|T2V|V2V|Audio|Music|Panorama|Combined|LDM3D"
)
# Arguments that only such classes have. A plain `image` is no such mark: FLUX.2 takes it or leaves it.
_OTHER_ARGUMENTS = (
    "num_frames",
    "video",
    "video_length",
    "audio_length_in_s",
    "mask_image",
    "control_image",
    "pag_scale",
)
_ALWAYS = frozenset({"seed", "num_outputs_per_prompt", "priority", "deadline_s"})
_WHEN_ACCEPTED = frozenset({"width", "height", "num_inference_steps", "max_sequence_length"})
_DEFAULT_SIDE = 1024
_MAX_SIDE = 4096


def describe(name: str, folder: Path) -> ModelCard:
    """The card of a diffusers folder. Raises ConfigError for a pipeline that is not text-to-image, naming its class."""
    index = read_index(folder)
    call = _call_signature(name, index.pipeline_class)
    scale = _vae_scale(index, folder)
    side = _side(index, folder, scale)
    tokens = int(call.number("max_sequence_length", 512))
    return ModelCard(
        name=name,
        family=SPEC.family,
        pipeline_class=index.pipeline_class,
        task="text-to-image",
        path=str(folder),
        defaults=Defaults(
            width=int(call.number("width", side)),
            height=int(call.number("height", side)),
            num_inference_steps=int(call.number("num_inference_steps", 50)),
            guidance_scale=call.number(guidance_argument(call), 1.0),
            max_sequence_length=tokens,
        ),
        parameters=_parameters(call),
        size_multiple=2 * scale,
        min_side=8 * scale,
        max_side=_MAX_SIDE,
        pixels_per_token=scale**2 if "unet" in index.components else (2 * scale) ** 2,
        max_sequence_length=tokens,
        # A distilled guidance is an input of the model: one forward, however large it is.
        guidance_threshold=1.0 if takes_negative(call) else MAX_GUIDANCE,
        previews=False,
        latents=False,
        exclusive=True,
    )


def guidance_argument(call: CallSignature) -> str:
    """The argument that classifier-free guidance has in this class: Qwen-Image's `guidance_scale` is another thing."""
    distilled_only = "true_cfg_scale" in call and call.defaults.get("guidance_scale") is None
    return "true_cfg_scale" if distilled_only else "guidance_scale"


def takes_negative(call: CallSignature) -> bool:
    """Whether a negative prompt acts: next to `true_cfg_scale`, only if that is what guidance_scale means."""
    return "negative_prompt" in call and ("true_cfg_scale" not in call or guidance_argument(call) == "true_cfg_scale")


def _parameters(call: CallSignature) -> frozenset[str]:
    found = _ALWAYS | {name for name in _WHEN_ACCEPTED if name in call}
    if guidance_argument(call) in call:
        found |= {"guidance_scale"}
    return found | {"negative_prompt"} if takes_negative(call) else found


def _call_signature(name: str, pipeline_class: str) -> CallSignature:
    found = signature.read(pipeline_class)
    if found is None:
        raise ConfigError(
            f"{name}: its pipeline class {pipeline_class} is not in the installed diffusers {version('diffusers')}; "
            "a newer diffusers may have it. `mmgen models` lists what runs here.",
            param="model_path",
        )
    reason = _why_not(pipeline_class, found)
    if reason:
        raise ConfigError(
            f"{name}: its pipeline class {pipeline_class} {reason}. The diffusers fallback runs text-to-image "
            "pipelines only; `mmgen models` lists what else runs here.",
            param="model_path",
        )
    return found


def _why_not(pipeline_class: str, call: CallSignature) -> str:
    mark = _OTHER_TASKS.search(pipeline_class)
    if mark:
        return f"is not for text-to-image ({mark.group()!r} in its name)"
    needed = [name for name in call.required if name != "prompt"]
    if needed:
        return f"needs {', '.join(map(repr, needed))} besides a prompt"
    other = [name for name in _OTHER_ARGUMENTS if name in call]
    if other:
        return f"is not for text-to-image (it takes {', '.join(map(repr, other))})"
    if any(name not in call for name in ("prompt", "width", "num_inference_steps", "output_type")):
        return "does not make images of a given size from a prompt in steps"
    if step_callback(call) is None:
        return "calls nothing back after a step, so that it could be neither followed nor cancelled"
    return ""


def step_callback(call: CallSignature) -> str | None:
    """The argument that takes a function to call after every step; old classes have `callback`."""
    return next((name for name in ("callback_on_step_end", "callback") if name in call), None)


def _vae_scale(index: Index, folder: Path) -> int:
    """Image pixels per latent pixel, along one side."""
    config = _config(index, folder, "vae") or _config(index, folder, "vqvae")
    channels = config.get("block_out_channels", config.get("encoder_block_out_channels"))
    return 2 ** (len(channels) - 1) if isinstance(channels, list) and channels else 8


def _side(index: Index, folder: Path, scale: int) -> int:
    """The side that the model was trained for, where its config says so."""
    for part in ("unet", "transformer"):
        size = _config(index, folder, part).get("sample_size")
        if isinstance(size, int) and 8 <= size <= _MAX_SIDE // scale:
            return size * scale - size * scale % (2 * scale)
    return _DEFAULT_SIDE


def _config(index: Index, folder: Path, part: str) -> dict[str, Any]:
    return read_json(folder, f"{part}/config.json") if part in index.components else {}
