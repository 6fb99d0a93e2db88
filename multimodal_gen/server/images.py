"""`POST /v1/images/generations`, and `DELETE` to give one up."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request, Response

from multimodal_gen.errors import (
    Cancelled,
    CapacityError,
    InvalidSize,
    NotFound,
    UnsupportedEndpoint,
    UnsupportedParameter,
)
from multimodal_gen.media.maker import Maker
from multimodal_gen.messages import Finished
from multimodal_gen.request import MAX_STEPS, ImageRequest, SamplingParams
from multimodal_gen.resolve import resolve
from multimodal_gen.server import replies
from multimodal_gen.server.context import Context, fingerprint
from multimodal_gen.server.disconnect import unless_gone
from multimodal_gen.server.enhance import enhance, is_guided, time_left
from multimodal_gen.server.errors import ERROR_RESPONSES
from multimodal_gen.server.json_body import parse_object
from multimodal_gen.server.models import check_model
from multimodal_gen.server.replies import Form
from multimodal_gen.server.schemas import STEP_FACTORS, ImageGenerationRequest, read
from multimodal_gen.server.sse import ImageStream
from multimodal_gen.server.wishes import check_priority, pins_for, still_loading

if TYPE_CHECKING:
    from multimodal_gen.engine.ticket import Ticket
    from multimodal_gen.server.guard import Exchange

_OPENAPI_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": ImageGenerationRequest.model_json_schema()}},
    }
}
_SAME_NAME = (
    "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed",
    "cfg_normalization", "cfg_truncation", "max_sequence_length", "step_cache", "priority", "deadline_s",
)  # fmt: skip


def router(context: Context) -> APIRouter:
    """The image routes of one server."""
    routes = APIRouter(tags=["images"], responses=ERROR_RESPONSES)

    @routes.post("/v1/images/generations", summary="Make images", openapi_extra=_OPENAPI_BODY)
    async def generate(request: Request) -> Response:
        exchange: Exchange = request.scope["state"]["exchange"]
        body = parse_object(await request.body())
        wish, unknown = read(body, unknown=context.config.unknown_fields)
        settled = settle(wish, context, exchange)
        work = enhance(wish, settled, context, exchange, wish.deadline_s)
        enhanced = await (unless_gone(work, request.receive) if wish.enhance_prompt else work)
        if enhanced.revision is not None:
            wish = enhanced.applied(wish, settled, guided=is_guided(settled, context))
            settled = settle(wish, context, exchange)
        settled = msgspec.structs.replace(settled, deadline_s=time_left(settled.deadline_s, enhanced))
        warnings = [*(f"Unknown field {name} was ignored." for name in unknown), *enhanced.warnings]
        headers = {"x-mmgen-warning": "unknown fields ignored: " + ", ".join(unknown)} if unknown else {}
        ticket, maker = _submit(settled, context)
        form = Form.of(wish, settled, context.card, context.model_name, revised=enhanced.revision is not None)
        if wish.stream:
            return ImageStream(context, exchange, ticket, form, maker, warnings, headers)
        with context.running.hold(exchange.owner, exchange.request_id, ticket):
            finished = await _finished(ticket, request, context)
        content = await _encode(context, settled, exchange.request_id, finished, form, maker, warnings)
        return Response(content, media_type="application/json", headers=headers)

    @routes.delete("/v1/images/generations/{request_id}", summary="Cancel a running request")
    async def cancel(request: Request, request_id: str) -> dict[str, Any]:
        exchange: Exchange = request.scope["state"]["exchange"]
        if not context.running.cancel(exchange.owner, request_id):
            raise NotFound(f"No request {request_id[:128]!a} is waiting or running; it may have finished.")
        return {"id": request_id, "object": "image.generation.cancelled", "cancelled": True}

    return routes


def settle(wish: ImageGenerationRequest, context: Context, exchange: Exchange) -> ImageRequest:
    """The engine's request for a client's wish.

    Raises: ModelNotFound, UnsupportedParameter, the InvalidValue family, RequestTooLarge.
    """
    check_model(wish.model, context)
    if context.card.media != "image":
        raise UnsupportedEndpoint(f"{context.model_name} makes videos; use POST /v1/videos.")
    check_priority(wish.priority, context.config.max_priority)
    given = {name: value for name, value in wish.model_dump(include=set(_SAME_NAME)).items() if value is not None}
    if wish.size not in (None, "auto"):
        given["width"], given["height"] = (int(side) for side in (wish.size or "").split("x"))
    steps = _steps_of_quality(wish, context)
    if steps is not None:
        given["num_inference_steps"] = steps
    if wish.n is not None:
        given["num_outputs_per_prompt"] = wish.n
    pins = pins_for(wish.loras, context)
    try:
        request = resolve(
            request_id=exchange.work_id(),
            prompt=wish.prompt,
            params=SamplingParams(**given),
            card=context.card,
            max_cost=context.config.max_request_cost,
            previews=wish.partial_images or 0,
            fair_key=fingerprint(exchange.owner, wish.safety_identifier or wish.user or ""),
            loras=pins,
            own_loras=wish.loras is not None,
        )
        assert isinstance(request, ImageRequest), context.card.media
        return request
    except InvalidSize as error:
        if wish.size is not None:
            error.param = "size"
        raise


def _steps_of_quality(wish: ImageGenerationRequest, context: Context) -> int | None:
    factor = STEP_FACTORS[wish.quality or "auto"]
    if factor == 1.0:
        return None
    if "num_inference_steps" not in context.card.parameters:
        raise UnsupportedParameter(
            f"{context.model_name} has a fixed number of steps, so quality = {wish.quality!r} makes no difference; "
            "leave it out.",
            param="quality",
        )
    return min(max(math.ceil(context.card.defaults.num_inference_steps * factor), 1), MAX_STEPS)


def _submit(settled: ImageRequest, context: Context) -> tuple[Ticket, Maker]:
    ready = context.engine.ready
    try:
        if ready is None:
            raise still_loading()
        ticket = context.engine.submit(settled)
    except CapacityError as error:
        context.metrics.rejected(error.code)
        raise
    return ticket, Maker(ready, context.config, context.card)


async def _finished(ticket: Ticket, request: Request, context: Context) -> Finished:
    try:
        finished = await unless_gone(ticket.result(), request.receive)
    except Cancelled:
        context.metrics.cancelled()
        raise
    context.metrics.generated(finished.timings, ticket.request.n)
    return finished


async def _encode(
    context: Context,
    settled: ImageRequest,
    request_id: str,
    finished: Finished,
    form: Form,
    maker: Maker,
    warnings: list[str],
) -> bytes:
    started = time.perf_counter()
    content = await asyncio.get_running_loop().run_in_executor(
        context.encoders, replies.answer, settled, request_id, finished, form, maker, warnings
    )
    context.metrics.files_encoded(time.perf_counter() - started)
    return content
