"""From a wish to a settled request: every open value filled from the model's card, every value checked.

No torch, no I/O. Errors name the field and say what would be right.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from multimodal_gen import step_cache
from multimodal_gen.adapters import Pin
from multimodal_gen.errors import (
    InvalidN,
    InvalidSize,
    InvalidValue,
    PromptTooLong,
    RequestTooLarge,
    UnsupportedParameter,
    did_you_mean,
)
from multimodal_gen.request import (
    MAX_FLOW_SHIFT,
    MAX_FPS,
    MAX_GUIDANCE,
    MAX_N,
    MAX_PREVIEWS,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_STEPS,
    AnyRequest,
    ImageRequest,
    ModelCard,
    OutputKind,
    SamplingParams,
    VideoLimits,
    VideoRequest,
)
from multimodal_gen.step_cache import AnyStepCache

MAX_OUTPUT_BYTES = 1 << 30  # pixels of one request: they travel in one message


def resolve(
    *,
    request_id: str,
    prompt: str,
    params: SamplingParams,
    card: ModelCard,
    max_cost: int,
    output: OutputKind = "pixels",
    previews: int = 0,
    checkpoint_every: int = 0,
    fair_key: str = "",
    loras: tuple[Pin, ...] = (),
    own_loras: bool = False,
) -> AnyRequest:
    """Settle every open value from the model's card and check each of them; the card decides what is made.

    Raises: the `InvalidValue` family, naming the field; `RequestTooLarge` with the estimate in token-steps.
    """
    _check_supported(params, previews, card)
    guidance = _number(_or(params.guidance_scale, card.defaults.guidance_scale), "guidance_scale", 0.0, MAX_GUIDANCE)
    guided = guidance > card.guidance_threshold
    if not guided:
        _check_unguided(params, guidance, card)
    common = _common(prompt, params, card)
    common |= {
        "id": request_id,
        "guidance_scale": guidance,
        "loras": loras,
        "own_loras": own_loras,
        "output": output,
        "previews": _previews(previews, common["num_inference_steps"]),
        "checkpoint_every": checkpoint_every,
        "fair_key": fair_key,
    }
    if card.video is None:
        request: AnyRequest = _image(common, params, card, guided)
    else:
        request = _video(common, params, card, card.video, guided)
    if request.cost > max_cost:
        what = "image(s)" if card.video is None else "video(s)"
        raise RequestTooLarge(
            f"This request needs about {request.cost:,} token-steps ({request.n} {what} x {request.row_tokens:,} "
            f"tokens x {request.num_inference_steps} steps) and one request may use {max_cost:,}. Lower n, the size, "
            "the length or the steps, or raise --max-request-cost on the server."
        )
    return request


def _common(prompt: str, params: SamplingParams, card: ModelCard) -> dict[str, Any]:
    """The fields that images and videos share."""
    defaults = card.defaults
    prompt, negative = _check_text(prompt, "prompt"), params.negative_prompt
    if not prompt.strip():
        raise InvalidValue(f"'prompt' is empty; describe the {card.media} in a few words.", param="prompt")
    n = _integer(params.num_outputs_per_prompt, "n", 1, MAX_N, InvalidN)
    width, height = _check_size(params.width, params.height, card)
    steps = _or(params.num_inference_steps, defaults.num_inference_steps)
    steps = _integer(steps, "num_inference_steps", 1, MAX_STEPS)
    length = _or(params.max_sequence_length, min(defaults.max_sequence_length, card.max_sequence_length))
    deadline = params.deadline_s
    return {
        "model": card.name,
        "prompt": prompt,
        "negative_prompt": None if negative is None else _check_text(negative, "negative_prompt"),
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "step_cache": _step_cache(params.step_cache, card, steps),
        "seeds": _seeds(params.seed, n),
        "max_sequence_length": _integer(length, "max_sequence_length", 1, card.max_sequence_length),
        "priority": _integer(params.priority, "priority", -100, 100),
        "deadline_s": None if deadline is None else _number(deadline, "deadline_s", 1e-3, 86_400.0),
    }


def _step_cache(text: str | None, card: ModelCard, steps: int) -> AnyStepCache | None:
    """What was asked for; else what the settings say, where the request has steps enough for it."""
    try:
        cache = step_cache.read(card.step_cache if text is None else text)
    except ValueError as error:
        raise InvalidValue(f"'step_cache': {error}.", param="step_cache") from None
    if cache is None or cache.acts_in(steps):
        return cache
    if text is None:
        return None
    raise InvalidValue(
        f"'step_cache' has no effect in {steps} step(s): the first {cache.first} and the last are always computed. "
        "Leave it out, or take more steps.",
        param="step_cache",
    )


def _image(common: dict[str, Any], params: SamplingParams, card: ModelCard, guided: bool) -> ImageRequest:
    texts = [common["prompt"], common["negative_prompt"] or ""] if guided else [common["prompt"]]
    image = common["width"] * common["height"] // card.pixels_per_token
    truncation = params.cfg_truncation
    return ImageRequest(
        **common,
        cfg_normalization=_number(params.cfg_normalization, "cfg_normalization", 0.0, 100.0),
        cfg_truncation=None if truncation is None else _number(truncation, "cfg_truncation", 0.0, 1e6),
        row_tokens=sum(image + _estimate_tokens(text, common["max_sequence_length"]) for text in texts),
    )


def _video(
    common: dict[str, Any], params: SamplingParams, card: ModelCard, limits: VideoLimits, guided: bool
) -> VideoRequest:
    frames = _check_frames(_or(params.num_frames, card.defaults.num_frames), limits)
    _check_start(params.image, card, limits)
    second = params.guidance_scale_2 if params.guidance_scale_2 is not None else card.defaults.guidance_scale_2
    if second is None and "guidance_scale_2" in card.parameters:
        second = common["guidance_scale"]
    shift = params.flow_shift
    latents = (frames - 1) // limits.frames_per_latent + 1
    request = VideoRequest(
        **common,
        num_frames=frames,
        fps=_integer(_or(params.fps, card.defaults.fps or 16), "fps", 1, MAX_FPS),
        guidance_scale_2=None if second is None else _number(second, "guidance_scale_2", 0.0, MAX_GUIDANCE),
        flow_shift=None if shift is None else _number(shift, "flow_shift", 0.01, MAX_FLOW_SHIFT),
        image=params.image,
        row_tokens=latents * (common["width"] * common["height"] // card.pixels_per_token) * (2 if guided else 1),
    )
    pixels = 3 * request.n * frames * request.width * request.height
    if pixels > MAX_OUTPUT_BYTES:
        raise RequestTooLarge(
            f"{request.n} video(s) of {frames} frames at {request.width}x{request.height} are {pixels:,} bytes of "
            f"pixels and one request may make {MAX_OUTPUT_BYTES:,}. Lower n, the size or the length."
        )
    return request


def _check_frames(frames: object, limits: VideoLimits) -> int:
    count = _integer(frames, "num_frames", 1, limits.max_frames)
    step = limits.frames_per_latent
    if (count - 1) % step:
        near = min(nearest_frames(count, limits), limits.max_frames)
        raise InvalidValue(
            f"'num_frames' must be {step}k + 1 (1, {step + 1}, {2 * step + 1}, …), got {count}; try {near}.",
            param="num_frames",
        )
    return count


def nearest_frames(frames: float, limits: VideoLimits) -> int:
    """The legal number of frames next to any number; the longer one of two."""
    step = limits.frames_per_latent
    return max(0, math.floor((frames - 1) / step + 0.5)) * step + 1


def _check_start(image: bytes | None, card: ModelCard, limits: VideoLimits) -> None:
    if image is not None and limits.image == "none":
        raise InvalidValue(f"{card.name} makes videos from text alone; leave the image out.", param="image")
    if image is None and limits.image == "required":
        raise InvalidValue(f"{card.name} makes videos that start from a picture; give one.", param="image")


def _check_unguided(params: SamplingParams, guidance: float, card: ModelCard) -> None:
    """What only guidance reads must not be accepted and ignored."""
    idle = {
        "negative_prompt": not params.negative_prompt,
        "guidance_scale_2": params.guidance_scale_2 is None,
        "cfg_normalization": not params.cfg_normalization,
        "cfg_truncation": params.cfg_truncation in (None, _UNSET_PARAMS["cfg_truncation"]),
    }
    for name, unused in idle.items():
        if not unused:
            raise InvalidValue(
                f"{name!r} has no effect at guidance_scale {guidance:g}; leave it out, or set guidance_scale above "
                f"{card.guidance_threshold:g}.",
                param=name,
            )


def _estimate_tokens(text: str, limit: int) -> int:
    """Tokens of a prompt before it is encoded: about three characters each, a template, padded to a multiple of 32."""
    return -(-min(limit, len(text) // 3 + 16) // 32) * 32


def _previews(value: int, steps: int) -> int:
    previews = _integer(value, "partial_images", 0, MAX_PREVIEWS)
    if previews >= steps and previews:
        raise InvalidValue(
            f"'partial_images' = {previews} needs at least {previews + 1} steps; this request has {steps}.",
            param="partial_images",
        )
    return previews


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_supported(params: SamplingParams, previews: int, card: ModelCard) -> None:
    given = {name for name, value in msgspec.structs.asdict(params).items() if value != _UNSET_PARAMS[name]}
    for name in sorted(given - card.parameters):
        raise UnsupportedParameter(
            f"{card.name} ({card.pipeline_class}) does not use {name!r}; leave it out."
            + did_you_mean(name, card.parameters),
            param=name,
        )
    if previews and not card.previews:
        raise UnsupportedParameter(
            f"{card.name} ({card.pipeline_class}) cannot show partial images; leave 'partial_images' out.",
            param="partial_images",
        )


_UNSET_PARAMS = msgspec.structs.asdict(SamplingParams())


def _check_text(text: str, param: str) -> str:
    if not isinstance(text, str):
        raise InvalidValue(f"{param!r} must be a string, not {type(text).__name__}.", param=param)
    if len(text) > MAX_PROMPT_CHARS:
        raise PromptTooLong(
            f"{param!r} has {len(text):,} characters; the limit is {MAX_PROMPT_CHARS:,}. Shorten it.", param=param
        )
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise InvalidValue(f"{param!r} holds a lone surrogate, which is not valid Unicode text.", param=param)
    return text


def _check_size(width: int | None, height: int | None, card: ModelCard) -> tuple[int, int]:
    sides = []
    for value, default, param in ((width, card.defaults.width, "width"), (height, card.defaults.height, "height")):
        side = _integer(_or(value, default), param, card.min_side, card.max_side, InvalidSize)
        if side % card.size_multiple:
            near = max(card.min_side, round(side / card.size_multiple) * card.size_multiple)
            raise InvalidSize(
                f"{param!r} must be a multiple of {card.size_multiple} pixels, got {side}; try {near}.", param=param
            )
        sides.append(side)
    return sides[0], sides[1]


def _brief(value: object) -> str:
    """A value as a message shows it; Python refuses to print whole numbers of more than 4,300 digits."""
    return "a huge number" if isinstance(value, int) and value.bit_length() > 1000 else str(value)[:40]


def _integer(value: object, param: str, low: int, high: int, error: type[InvalidValue] = InvalidValue) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(f"{param!r} must be a whole number, got {_brief(value)!r}.", param=param)
    if not low <= value <= high:
        raise error(f"{param!r} must be between {low} and {high}, got {_brief(value)}.", param=param)
    return value


def _number(value: object, param: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidValue(f"{param!r} must be a number, got {_brief(value)!r}.", param=param)
    # NaN fails every comparison; math.isfinite would raise for a whole number too large for a float.
    if not low <= value <= high:
        raise InvalidValue(f"{param!r} must be between {low:g} and {high:g}, got {_brief(value)}.", param=param)
    return float(value)


def _seeds(seed: int | Sequence[int] | None, n: int) -> tuple[int, ...]:
    if seed is None:
        seed = secrets.randbelow(2**31)
    if isinstance(seed, int) and not isinstance(seed, bool):
        first = _integer(seed, "seed", 0, MAX_SEED - (n - 1))
        return tuple(first + i for i in range(n))
    if isinstance(seed, (str, bytes)) or not isinstance(seed, Sequence):
        raise InvalidValue(f"'seed' must be a whole number or a list of them, got {str(seed)[:40]!r}.", param="seed")
    if len(seed) != n:
        raise InvalidValue(f"'seed' lists {len(seed)} seeds for n = {n} images; the numbers must match.", param="seed")
    return tuple(_integer(s, "seed", 0, MAX_SEED) for s in seed)
