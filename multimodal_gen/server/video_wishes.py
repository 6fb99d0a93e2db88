"""A client's wish for videos → the engine's request, and the job that keeps it."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec

from multimodal_gen.engine.jobs import Job
from multimodal_gen.errors import InvalidSize, InvalidValue
from multimodal_gen.request import MAX_FPS, ModelCard, SamplingParams, VideoRequest
from multimodal_gen.resolve import nearest_frames, resolve
from multimodal_gen.server.context import Context, fingerprint
from multimodal_gen.server.enhance import Enhanced
from multimodal_gen.server.form_fields import PICTURE
from multimodal_gen.server.models import check_model
from multimodal_gen.server.video_schemas import VideoSettings, seconds_of
from multimodal_gen.server.wishes import check_priority, pins_for, still_loading
from multimodal_gen.step_cache import write

_SAME_NAME = (
    "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "guidance_scale_2", "seed",
    "flow_shift", "num_frames", "fps", "max_sequence_length", "step_cache", "priority",
)  # fmt: skip


def settle(
    wish: VideoSettings, context: Context, owner: str, picture: bytes | None, source: VideoRequest | None = None
) -> VideoRequest:
    """The engine's request for a wish; what the wish leaves open is taken from `source`, which it remixes.

    Raises: ModelNotFound, ModelLoading, UnsupportedParameter, the InvalidValue family, RequestTooLarge, the
    AdapterError family.
    """
    check_model(wish.model, context)
    check_priority(wish.priority, context.config.max_priority)
    if context.engine.ready is None:
        raise still_loading()
    card = context.card
    given = {} if source is None else _as_given(source, wish, card)
    given |= {name: value for name, value in wish.model_dump(include=set(_SAME_NAME)).items() if value is not None}
    if wish.size not in (None, "auto"):
        given["width"], given["height"] = (int(side) for side in (wish.size or "").split("x"))
    if wish.n is not None:
        given["num_outputs_per_prompt"] = wish.n
    if picture is not None:
        given["image"] = picture
    frames = _frames(wish, given.get("fps"), card)
    if frames is not None:
        given["num_frames"] = frames
    inherits = source is not None and wish.loras is None
    try:
        request = resolve(
            request_id="video_" + uuid.uuid4().hex,
            prompt=wish.prompt,
            params=SamplingParams(**given),
            card=card,
            max_cost=context.config.max_request_cost,
            checkpoint_every=context.config.checkpoint_every,
            fair_key=fingerprint(owner, wish.safety_identifier or wish.user or ""),
            loras=source.loras if source is not None and inherits else pins_for(wish.loras, context),
            own_loras=source.own_loras if source is not None and inherits else wish.loras is not None,
        )
    except InvalidValue as error:
        if isinstance(error, InvalidSize) and wish.size is not None:
            error.param = "size"
        elif error.param == "image":
            error.param = PICTURE
        raise
    assert isinstance(request, VideoRequest), card.media
    return request


def make_job(
    wish: VideoSettings,
    request: VideoRequest,
    context: Context,
    owner: str,
    enhanced: Enhanced,
    *,
    body_hash: str,
    idempotency_key: str | None,
    remixed_from: str | None = None,
) -> Job:
    """The job of a settled request."""
    asked = None if wish.seconds is None else str(wish.seconds)
    return Job(
        id=request.id,
        owner=owner,
        model=context.model_name,
        prompt=wish.prompt,
        seconds=asked or f"{request.num_frames / request.fps:.6g}",
        size=f"{request.width}x{request.height}",
        outputs=request.n,
        output_format=wish.output_format or "mp4",
        facts=msgspec.json.encode(_facts(request, enhanced)).decode(),
        created_at=int(time.time()),
        remixed_from=remixed_from,
        idempotency_key=idempotency_key,
        body_hash=body_hash,
        priority=request.priority,
        fair_key=request.fair_key,
        cost=request.cost,
    )


def _facts(request: VideoRequest, enhanced: Enhanced) -> dict[str, Any]:
    """What was settled for the client, as the video object shows it."""
    revised = {} if enhanced.revision is None else {"revised_prompt": request.prompt}
    warned = {"warnings": enhanced.warnings} if enhanced.warnings else {}
    return {
        **revised,
        **warned,
        "n": request.n,
        "seeds": request.seeds,
        "num_frames": request.num_frames,
        "fps": request.fps,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "guidance_scale_2": request.guidance_scale_2,
        "flow_shift": request.flow_shift,
        "negative_prompt": request.negative_prompt,
        "step_cache": write(request.step_cache),
        "loras": [{"nickname": pin.nickname, "strength": pin.strength, "target": pin.tree} for pin in request.loras],
    }


def _as_given(source: VideoRequest, wish: VideoSettings, card: ModelCard) -> dict[str, Any]:
    """The settings of a request as its client could have given them, but for those that the wish makes meaningless."""
    settled = msgspec.structs.asdict(source)
    given = {name: settled[name] for name in _SAME_NAME if name in settled}
    cache, steps = source.step_cache, wish.num_inference_steps or source.num_inference_steps
    given["step_cache"] = write(cache if cache is not None and cache.acts_in(steps) else None)
    given |= {"seed": list(source.seeds), "num_outputs_per_prompt": source.n, "image": source.image}
    guidance = source.guidance_scale if wish.guidance_scale is None else wish.guidance_scale
    if guidance <= card.guidance_threshold or (guidance != source.guidance_scale and _follows(source)):
        given["guidance_scale_2"] = None
    if wish.n is not None and wish.n != source.n:
        given["seed"] = source.seeds[0]
    return {name: value for name, value in given.items() if name in card.parameters}


def _follows(source: VideoRequest) -> bool:
    """Whether the second expert's weight is most likely there because the first one's was given."""
    return source.guidance_scale_2 == source.guidance_scale


def _frames(wish: VideoSettings, fps: int | None, card: ModelCard) -> int | None:
    """Frames for the length that was asked for; None where none was. Raises: InvalidValue."""
    seconds, limits = seconds_of(wish.seconds), card.video
    assert limits is not None, "checked before"
    rate = fps or card.defaults.fps or 16
    if seconds is None or not 1 <= rate <= MAX_FPS:  # `resolve` tells what is wrong with fps
        return None
    frames = nearest_frames(seconds * rate, limits)
    if frames > limits.max_frames:
        raise InvalidValue(
            f"'seconds' may be at most {limits.max_frames / rate:.4g} at {rate} frames per second, got {seconds:g}: "
            f"this model makes up to {limits.max_frames} frames.",
            param="seconds",
        )
    return frames
