"""What a user asks for and gets: plain data, no torch, no behaviour beyond checking itself.

`SamplingParams` is the wish (None = the model's default). `resolve` turns it into an `ImageRequest`, in which every
value is settled and the cost is known, or raises the error that names the field.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Literal

import msgspec

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

MAX_N = 10
MAX_STEPS = 1000
MAX_PROMPT_CHARS = 32_000
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100.0
MAX_PREVIEWS = 3

OutputKind = Literal["image", "latent"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to sample. Every field left None takes the model's default."""

    negative_prompt: str | None = None
    width: int | None = None
    """pixels"""
    height: int | None = None
    """pixels"""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """classifier-free guidance weight, in the convention of the model family; 0 = one forward per step"""
    seed: int | Sequence[int] | None = None
    """image i uses seed + i; a list gives one seed per image; None draws one"""
    num_outputs_per_prompt: int = 1
    cfg_normalization: float = 0.0
    """cap of the guided prediction's norm as a multiple of the unguided one's; 0 = no cap"""
    cfg_truncation: float | None = 1.0
    """guidance stops once the normalised time (0 noise … 1 clean) passes this; None = never"""
    max_sequence_length: int | None = None
    """prompt tokens kept"""
    priority: int = 0
    """higher runs first"""
    deadline_s: float | None = None
    """seconds from arrival after which the answer is worthless and the request is dropped"""


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """A model's own choice for what the user leaves open."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int = 512


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What the outside needs to know of a model; filled by `engine.describe` from the model's folder, without torch."""

    name: str
    family: str
    pipeline_class: str
    task: Literal["text-to-image"]
    path: str
    defaults: Defaults
    parameters: frozenset[str]
    """names of the `SamplingParams` fields that this model honours"""
    size_multiple: int
    """width and height must be multiples of this many pixels"""
    min_side: int
    max_side: int
    pixels_per_token: int
    """image pixels per transformer token: the cost of a step is counted in tokens"""
    max_sequence_length: int
    guidance_threshold: float
    """two forwards per step are needed when guidance_scale is above this"""
    previews: bool = True
    """whether intermediate images can be decoded"""
    latents: bool = True
    """whether final latents can be returned instead of pixels"""
    exclusive: bool = False
    """rows cannot share the model: each runs from its first step to its last before another starts"""


class ImageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One settled request; made by `resolve`, read by everyone after it."""

    id: str
    model: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    """one per image"""
    cfg_normalization: float
    cfg_truncation: float | None
    max_sequence_length: int
    loras: tuple[Pin, ...] = ()
    """adapters per module tree, in the order of addition"""
    own_loras: bool = False
    """the list came with the request; False: it is the active one of the moment when the request arrived"""
    output: OutputKind = "image"
    previews: int = 0
    """intermediate images per output"""
    priority: int = 0
    deadline_s: float | None = None
    """seconds that were left when this message was sent"""
    fair_key: str = ""
    """requests with the same key share one fair portion of the machine"""
    row_tokens: int = 0
    """transformer tokens that one image of this request adds to a step, guidance included"""

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.seeds)

    @property
    def cost(self) -> int:
        """Token-steps of the whole request: the unit of queue limits and budgets."""
        return self.row_tokens * self.num_inference_steps * self.n


class Timings(msgspec.Struct, kw_only=True):
    """Where the time of one request went, in seconds."""

    queue: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    steps: int = 0
    """denoising steps of one image"""

    @property
    def per_step(self) -> float:
        """Mean seconds per denoising step."""
        return self.denoise / self.steps if self.steps else 0.0


def resolve(
    *,
    request_id: str,
    prompt: str,
    params: SamplingParams,
    card: ModelCard,
    max_cost: int,
    output: OutputKind = "image",
    previews: int = 0,
    fair_key: str = "",
    loras: tuple[Pin, ...] = (),
    own_loras: bool = False,
) -> ImageRequest:
    """Settle every open value from the model's card and check each of them.

    Raises: the `InvalidValue` family, naming the field; `RequestTooLarge` with the estimate in token-steps.
    """
    _check_supported(params, previews, card)
    prompt, negative = _check_text(prompt, "prompt"), params.negative_prompt
    if not prompt.strip():
        raise InvalidValue("'prompt' is empty; describe the picture in a few words.", param="prompt")
    if negative is not None:
        negative = _check_text(negative, "negative_prompt")
    n = _integer(params.num_outputs_per_prompt, "n", 1, MAX_N, InvalidN)
    width, height = _check_size(params.width, params.height, card)
    defaults = card.defaults
    steps = _integer(_or(params.num_inference_steps, defaults.num_inference_steps), "num_inference_steps", 1, MAX_STEPS)
    guidance = _number(_or(params.guidance_scale, defaults.guidance_scale), "guidance_scale", 0.0, MAX_GUIDANCE)
    length = _integer(
        _or(params.max_sequence_length, min(defaults.max_sequence_length, card.max_sequence_length)),
        "max_sequence_length",
        1,
        card.max_sequence_length,
    )
    truncation = params.cfg_truncation
    guided = guidance > card.guidance_threshold
    if not guided:
        _check_unguided(params, guidance, card)
    texts = [prompt, negative or ""] if guided else [prompt]
    row_tokens = sum(width * height // card.pixels_per_token + _estimate_tokens(text, length) for text in texts)
    request = ImageRequest(
        id=request_id,
        model=card.name,
        prompt=prompt,
        negative_prompt=negative,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seeds=_seeds(params.seed, n),
        cfg_normalization=_number(params.cfg_normalization, "cfg_normalization", 0.0, 100.0),
        cfg_truncation=None if truncation is None else _number(truncation, "cfg_truncation", 0.0, 1e6),
        max_sequence_length=length,
        loras=loras,
        own_loras=own_loras,
        output=output,
        previews=_previews(previews, steps),
        priority=_integer(params.priority, "priority", -100, 100),
        deadline_s=None if params.deadline_s is None else _number(params.deadline_s, "deadline_s", 1e-3, 86_400.0),
        fair_key=fair_key,
        row_tokens=row_tokens,
    )
    if request.cost > max_cost:
        raise RequestTooLarge(
            f"This request needs about {request.cost:,} token-steps ({n} image(s) x {row_tokens:,} tokens x {steps} "
            f"steps) and one request may use {max_cost:,}. Lower n, the size or the steps, or raise "
            "--max-request-cost on the server."
        )
    return request


def _check_unguided(params: SamplingParams, guidance: float, card: ModelCard) -> None:
    """What only guidance reads must not be accepted and ignored."""
    idle = {
        "negative_prompt": not params.negative_prompt,
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
