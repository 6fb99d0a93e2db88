"""The request of `POST /v1/images/generations`: OpenAI's fields, ours, and which of their values we honour.

Types are strict: `true` is no number, `1.0` no whole number, `"7"` neither. `null` means the default. A value that we
cannot honour is an error that names it; nothing is clamped or ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from multimodal_gen.errors import (
    InvalidN,
    InvalidSize,
    InvalidValue,
    UnknownParameter,
    UnsupportedParameter,
    did_you_mean,
)
from multimodal_gen.request import MAX_N, MAX_PREVIEWS, MAX_PROMPT_CHARS, MAX_SEED, MAX_STEPS

Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]
STEP_FACTORS: dict[Quality, float] = {
    "auto": 1.0, "low": 0.5, "medium": 1.0, "high": 1.5, "standard": 1.0, "hd": 1.5,
}  # fmt: skip
"""quality → multiple of the model's default number of steps"""

SIZE = re.compile(r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}")


class ImageGenerationRequest(BaseModel):
    """A wish for images. Field descriptions appear in /openapi.json and /docs."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: str = Field(description=f"What the images show; 1 to {MAX_PROMPT_CHARS:,} characters.")
    model: str | None = Field(None, description="Id from /v1/models; default: the served model.")
    n: int | None = Field(None, description=f"Number of images, 1 to {MAX_N}; default 1.")
    size: str | None = Field(None, description="`WIDTHxHEIGHT` in pixels, or `auto` (default): the model's own size.")
    quality: Quality | None = Field(
        None,
        description="Multiple of the model's default steps: `low` 0.5, `auto` (default), `medium` and `standard` 1, "
        "`high` and `hd` 1.5. Not together with num_inference_steps.",
    )
    response_format: Literal["b64_json"] | None = Field(None, description="Only `b64_json`: images come in the answer.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="File format; default `png`.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp, 0 to 100 (default); png is lossless: only 100."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are always opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Accepted; this server filters nothing.")
    stream: bool | None = Field(None, description="Answer with server-sent events; default false.")
    partial_images: int | None = Field(
        None, ge=0, le=MAX_PREVIEWS, description="Previews per image, 0 (default) to 3; needs `stream`."
    )
    user: str | None = Field(None, max_length=512, description="Your end user: users share the machine fairly.")
    safety_identifier: str | None = Field(None, max_length=512, description="Same as `user`, and wins over it.")

    negative_prompt: str | None = Field(None, description="What the images should not show.")
    width: int | None = Field(None, description="Pixels; instead of `size`.")
    height: int | None = Field(None, description="Pixels; instead of `size`.")
    num_inference_steps: int | None = Field(
        None, description=f"Denoising steps, 1 to {MAX_STEPS}; default: the model's."
    )
    guidance_scale: float | None = Field(None, description="Classifier-free guidance, 0 to 100; default: the model's.")
    seed: int | Annotated[list[int], Field(max_length=MAX_N)] | None = Field(
        None, description=f"0 to {MAX_SEED}: image i uses seed + i; or one seed per image; default: random."
    )
    cfg_normalization: float | None = Field(
        None, description="Cap of the guided prediction's norm, as a multiple of the unguided one's; 0 (default): none."
    )
    cfg_truncation: float | None = Field(
        None, description="Guidance stops once the normalised time (0 noise, 1 clean) passes this; default 1: never."
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
    enhance_prompt: bool | None = Field(
        None,
        description="Have the server's language model rewrite the prompt first, within --enhance-timeout-s; default "
        "false.",
    )
    priority: int | None = Field(None, description="-100 to the server's --max-priority: higher runs first; default 0.")
    deadline_s: float | None = Field(
        None, description="Seconds after which the answer is worthless: the request is dropped with 504."
    )


_UNSUPPORTED_FIELDS = {
    "style": "describe the style in the prompt",
    "complexity": "use num_inference_steps",
    "frame_count": "this endpoint makes still images",
    "frame_duration_ms": "this endpoint makes still images",
    "svg": "this endpoint makes raster images: output_format png, jpeg or webp",
    "image": "this endpoint makes images from text alone",
    "mask": "this endpoint makes images from text alone",
    "input_fidelity": "this endpoint makes images from text alone",
}
_UNSUPPORTED_VALUES = {
    ("output_format", "gif"): "use png, jpeg or webp",
    ("output_format", "svg"): "use png, jpeg or webp",
    ("background", "transparent"): "images are opaque; use 'opaque' or 'auto'",
    ("response_format", "url"): "images come in the answer; use 'b64_json'",
    ("quality", "xhigh"): "use 'high', or set num_inference_steps",
    ("quality", "max"): "use 'high', or set num_inference_steps",
}
_OWN_ERRORS: dict[str, type[InvalidValue]] = {
    "n": InvalidN, "size": InvalidSize, "width": InvalidSize, "height": InvalidSize,
}  # fmt: skip
_EITHER = {"seed": f"a whole number, or a list of at most {MAX_N} of them"}
Wish = TypeVar("Wish", bound=BaseModel)
FIELDS = frozenset(ImageGenerationRequest.model_fields)


Unknown = Literal["error", "warn"]


def read(body: dict[str, Any], *, unknown: Unknown) -> tuple[ImageGenerationRequest, list[str]]:
    """The request in a JSON object, and the names of unknown fields where those are only worth a warning.

    Raises: UnknownParameter, UnsupportedParameter, and the InvalidValue family, naming the field.
    """
    _refuse_unsupported(body)
    wish, strange = validated(
        {name: value for name, value in body.items() if name not in _UNSUPPORTED_FIELDS},
        ImageGenerationRequest,
        unknown,
    )
    _check_combinations(wish)
    return wish, strange


def validated(
    body: dict[str, Any], schema: type[Wish], unknown: Unknown, either: Mapping[str, str] = _EITHER
) -> tuple[Wish, list[str]]:
    """`body` as `schema`, and the names of unknown fields where those are only worth a warning. `either` says what a
    field of several types must be.

    Raises: UnknownParameter; the InvalidValue family, naming the field.
    """
    fields = schema.model_fields
    strange = [name for name in body if name not in fields]
    if strange and unknown == "error":
        name = strange[0][:64]
        raise UnknownParameter(f"Unknown field {name!a}.{did_you_mean(name, fields)}", param=name)
    try:
        wish = schema.model_validate({name: value for name, value in body.items() if name in fields})
    except ValidationError as error:
        raise _explain(error, either) from None
    return wish, [ascii(name[:64]) for name in strange[:5]]


def _refuse_unsupported(body: dict[str, Any]) -> None:
    for name, advice in _UNSUPPORTED_FIELDS.items():
        if body.get(name) is not None:
            raise UnsupportedParameter(f"{name!r} is not supported: {advice}.", param=name)
    for (name, value), advice in _UNSUPPORTED_VALUES.items():
        if body.get(name) == value:
            raise UnsupportedParameter(f"{name} = {value!r} is not supported: {advice}.", param=name)


def _explain(error: ValidationError, either: Mapping[str, str]) -> InvalidValue:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return InvalidValue(f"{name!r} is missing.", param=name)
    if name in either:
        return InvalidValue(f"{name!r} must be {either[name]}, got {shown(first['input'])}.", param=name)
    must = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    must = {"integer": "a whole number", "number": "a number", "string": "a string", "boolean": "true or false"}.get(
        must, must
    )
    kind = _OWN_ERRORS.get(name, InvalidValue)
    return kind(f"{name!r} must be {must}, got {shown(first['input'])}.", param=name)


def shown(value: object) -> str:
    """A short ASCII picture of any JSON value, for messages."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return ascii(value[:40])
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "a number of more than 38 digits"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def check_size(size: str | None, width: int | None, height: int | None) -> None:
    """Raises: InvalidSize for text that is no size, and for a size said twice."""
    if size in (None, "auto"):
        return
    if not SIZE.fullmatch(size or ""):
        raise InvalidSize(
            f"'size' must be 'auto' or WIDTHxHEIGHT in pixels such as '128x128', got {shown(size)}.", param="size"
        )
    if width is not None or height is not None:
        raise InvalidSize("Give either 'size' or 'width' and 'height', not both.", param="size")


def _check_combinations(wish: ImageGenerationRequest) -> None:
    check_size(wish.size, wish.width, wish.height)
    if wish.quality not in (None, "auto") and wish.num_inference_steps is not None:
        raise InvalidValue(
            "'quality' chooses the number of steps; leave it out where you give 'num_inference_steps'.", param="quality"
        )
    if wish.partial_images and not wish.stream:
        raise InvalidValue("'partial_images' needs 'stream': true.", param="partial_images")
    if wish.output_format in (None, "png") and wish.output_compression not in (None, 100):
        raise UnsupportedParameter(
            "png is lossless: 'output_compression' is for jpeg and webp.", param="output_compression"
        )
