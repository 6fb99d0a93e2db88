"""The requests of `/v1/videos`: OpenAI's fields, ours, and which of their values we honour. As in `schemas`, types are
strict, `null` means the default, and nothing is clamped or ignored; form fields become these types in `form_fields`."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from multimodal_gen.errors import InvalidValue
from multimodal_gen.request import MAX_FLOW_SHIFT, MAX_FPS, MAX_N, MAX_PROMPT_CHARS, MAX_SEED, MAX_STEPS
from multimodal_gen.server.schemas import Unknown, check_size, shown, validated

MAX_SECONDS = 3600.0
_SECONDS = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6})?")


class VideoSettings(BaseModel):
    """What a new video and a remix may say. Field descriptions appear in /openapi.json and /docs."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: str = Field(description=f"What the video shows; 1 to {MAX_PROMPT_CHARS:,} characters.")
    model: str | None = Field(None, description="Id from /v1/models; default: the served model.")
    seconds: str | int | float | None = Field(
        None, description="Length, as text or number; the nearest number of frames that the model makes is taken."
    )
    size: str | None = Field(None, description="`WIDTHxHEIGHT` in pixels, or `auto` (default): the model's own size.")
    n: int | None = Field(None, description=f"Number of videos, 1 to {MAX_N}; default 1.")
    fps: int | None = Field(None, description=f"Frames per second of the file, 1 to {MAX_FPS}; default: the model's.")
    num_frames: int | None = Field(None, description="Frames; instead of `seconds`.")
    negative_prompt: str | None = Field(None, description="What the video should not show.")
    width: int | None = Field(None, description="Pixels; instead of `size`.")
    height: int | None = Field(None, description="Pixels; instead of `size`.")
    num_inference_steps: int | None = Field(
        None, description=f"Denoising steps, 1 to {MAX_STEPS}; default: the model's."
    )
    guidance_scale: float | None = Field(None, description="Classifier-free guidance, 0 to 100; default: the model's.")
    guidance_scale_2: float | None = Field(
        None, description="Guidance of the second expert, where the model has one; default: the same as guidance_scale."
    )
    seed: int | Annotated[list[int], Field(max_length=MAX_N)] | None = Field(
        None, description=f"0 to {MAX_SEED}: video i uses seed + i; or one seed per video; default: random."
    )
    flow_shift: float | None = Field(
        None, description=f"Shift of the noise schedule, up to {MAX_FLOW_SHIFT:g}; default: the checkpoint's."
    )
    max_sequence_length: int | None = Field(None, description="Prompt tokens kept; default: the model's.")
    step_cache: str | None = Field(
        None,
        max_length=128,
        description="Denoising steps that may be extrapolated instead of computed: `none`, `first-block`, `taylor`, or "
        "`METHOD:KEY=VALUE,…`; default: the server's --step-cache. Faster, and slightly approximate.",
    )
    loras: list[dict[str, Any]] | None = Field(
        None,
        description="Adapters for this request, in order, instead of the active ones: objects of `nickname`, "
        "`strength` (default 1) and `target` (default `all`); [] is the base model.",
    )
    output_format: Literal["mp4", "webm", "gif"] | None = Field(None, description="File format; default `mp4`.")
    user: str | None = Field(None, max_length=512, description="Your end user: users share the machine fairly.")
    safety_identifier: str | None = Field(None, max_length=512, description="Same as `user`, and wins over it.")
    enhance_prompt: bool | None = Field(
        None,
        description="Have the server's language model rewrite the prompt first, within --enhance-timeout-s; default "
        "false.",
    )
    priority: int | None = Field(None, description="-100 to the server's --max-priority: higher runs first; default 0.")


class VideoGenerationRequest(VideoSettings):
    """A wish for videos."""

    input_reference: dict[str, Any] | None = Field(
        None,
        description="Picture that the video starts from: a PNG, JPEG or WebP file of a form, or "
        '`{"image_url": "data:image/png;base64,…"}` in JSON.',
    )


VIDEO_FIELDS = frozenset(VideoGenerationRequest.model_fields)


def read_video(body: dict[str, Any], unknown: Unknown) -> tuple[VideoSettings, list[str]]:
    """The request in a JSON object or form (without its picture), and unknown fields that are only worth a warning.

    Raises: UnknownParameter; the InvalidValue family, naming the field.
    """
    wish, strange = validated(body, VideoSettings, unknown)
    check_size(wish.size, wish.width, wish.height)
    if wish.seconds is not None and wish.num_frames is not None:
        raise InvalidValue("Give either 'seconds' or 'num_frames', not both.", param="seconds")
    seconds_of(wish.seconds)
    return wish, strange


def seconds_of(value: str | float | None) -> float | None:
    """The length that was asked for. Raises: InvalidValue."""
    if value is None:
        return None
    text = value if isinstance(value, str) else str(value) if not isinstance(value, bool) else ""
    seconds = float(text) if isinstance(value, str) and _SECONDS.fullmatch(text) else value
    if isinstance(seconds, (str, bool)) or not 0 < seconds <= MAX_SECONDS:
        raise InvalidValue(
            f"'seconds' must be a number above 0 and up to {MAX_SECONDS:g}, such as '4', got {shown(value)}.",
            param="seconds",
        )
    return float(seconds)


def body_hash(wish: VideoSettings, picture: bytes | None, source: str = "") -> str:
    """The same for the same request, whatever its encoding and its multipart boundary; `source` is what is remixed."""
    fields = wish.model_dump(exclude_none=True, exclude_defaults=True)
    if "seconds" in fields:
        fields["seconds"] = seconds_of(wish.seconds)
    digest = hashlib.sha256(msgspec.json.encode([fields, source], order="sorted"))
    digest.update(b"" if picture is None else hashlib.sha256(picture).digest())
    return digest.hexdigest()
