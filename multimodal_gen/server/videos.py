"""`/v1/videos`: jobs that make videos, in the shape of OpenAI's API. What is answered with 200 is on the disk."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from multimodal_gen.errors import (
    CapacityError,
    InvalidImage,
    InvalidValue,
    NotFound,
    UnknownParameter,
    UnsupportedEndpoint,
    VideoNotReady,
    did_you_mean,
)
from multimodal_gen.request import VideoRequest
from multimodal_gen.server.context import Context
from multimodal_gen.server.enhance import enhance, is_guided
from multimodal_gen.server.errors import ERROR_RESPONSES
from multimodal_gen.server.form_fields import PICTURE, fields_of
from multimodal_gen.server.json_body import parse_object
from multimodal_gen.server.multipart import read_form
from multimodal_gen.server.pictures import Pictures
from multimodal_gen.server.ranges import file_answer
from multimodal_gen.server.security import VIDEOS_PATH, body_limit
from multimodal_gen.server.video_schemas import VideoGenerationRequest, VideoSettings, body_hash, read_video
from multimodal_gen.server.video_views import listing, poll_after_ms, view
from multimodal_gen.server.video_wishes import make_job, settle

if TYPE_CHECKING:
    from multimodal_gen.engine.job_files import Variant
    from multimodal_gen.engine.job_runner import JobRunner
    from multimodal_gen.engine.jobs import Job
    from multimodal_gen.server.guard import Exchange

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_WHOLE = re.compile(r"[0-9]{1,4}")
MAX_PAGE, DEFAULT_PAGE = 100, 20
# Bodies above this are parsed beside the event loop.
LARGE_BODY = 256 * 1024
_MEDIA = {"mp4": "video/mp4", "webm": "video/webm", "gif": "image/gif"}
# What a completed video can be asked for; the still's type, None for the video itself.
_VARIANTS: dict[Variant, str | None] = {"video": None, "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
_VIDEO_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": VideoGenerationRequest.model_json_schema()}
            for kind in ("application/json", "multipart/form-data")
        },
    }
}
_REMIX_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": VideoSettings.model_json_schema()}}}
}


def router(context: Context) -> APIRouter:
    """The video routes of one server."""
    routes = APIRouter(tags=["videos"], responses=ERROR_RESPONSES)
    pictures = Pictures(int(context.config.max_picture_mb * 2**20))

    @routes.post("/v1/videos", summary="Make videos", openapi_extra=_VIDEO_BODY)
    async def create(request: Request) -> Response:
        _runner(context)
        try:
            with pictures.room(_announced(request, context)):
                body = await _body(request, pictures)
                picture = await asyncio.to_thread(pictures.bytes_of, body.pop(PICTURE, None))
                return await _accept(request, body, picture)
        except CapacityError as error:
            context.metrics.rejected(error.code)
            raise

    @routes.get("/v1/videos", summary="List videos")
    async def list_videos(request: Request) -> dict[str, Any]:
        runner, owner = _runner(context), _owner(request)
        query = _query(request, ("after", "limit", "order"))
        limit, newest_first = _limit(query.get("limit")), _newest_first(query.get("order"))
        after = None
        if "after" in query:
            last = await runner.disk(runner.jobs.find, query["after"], owner)
            if last is None:
                raise InvalidValue(
                    f"'after' must be the id of a video; {query['after'][:64]!a} is none.", param="after"
                )
            after = last.number
        now = int(time.time())
        found = await runner.disk(runner.jobs.page, owner, after, limit + 1, newest_first=newest_first, now=now)
        return listing([_view(job) for job in found[:limit]], more=len(found) > limit)

    @routes.get("/v1/videos/{video_id}", summary="One video")
    async def one_video(request: Request, video_id: str) -> Response:
        job = await _find(request, video_id)
        headers = {} if job.finished else {"openai-poll-after-ms": str(poll_after_ms(job, context.engine.gauges))}
        return JSONResponse(_view(job), headers=headers)

    @routes.get("/v1/videos/{video_id}/content", summary="The file of a video, or a still", response_model=None)
    async def content(request: Request, video_id: str) -> Response:
        query = _query(request, ("variant", "index"))
        variant = _variant(query.get("variant", "video"))
        job = await _find(request, video_id)
        index = _index(query.get("index", "0"), job)
        if job.status != "completed":
            raise _not_ready(job)
        path = _runner(context).files.path(job.id, index, variant, job.output_format)
        media_type = _VARIANTS[variant] or _MEDIA[job.output_format]
        try:
            answer = await file_answer(request, path, media_type, f'"{job.id}-{index}-{variant}"')
        except FileNotFoundError:  # it expired a moment ago
            raise _not_found(video_id) from None
        name = f"{job.id}-{path.name}" if job.outputs > 1 else f"{job.id}{path.suffix}"
        answer.headers["content-disposition"] = f'inline; filename="{name}"'
        return answer

    @routes.delete("/v1/videos/{video_id}", summary="Stop a video and remove it")
    async def delete(request: Request, video_id: str) -> dict[str, Any]:
        job = await _find(request, video_id)
        if not await _runner(context).delete(job):
            raise _not_found(video_id)
        return {"id": job.id, "object": "video.deleted", "deleted": True}

    @routes.post("/v1/videos/{video_id}/remix", summary="The same video, otherwise", openapi_extra=_REMIX_BODY)
    async def remix(request: Request, video_id: str) -> Response:
        runner = _runner(context)
        body = parse_object(await request.body())
        job = await _find(request, video_id)
        try:
            source = await runner.disk(runner.jobs.request, job.id)
        except KeyError:
            raise _not_found(video_id) from None
        try:
            return await _accept(request, body, None, job, source)
        except CapacityError as error:
            context.metrics.rejected(error.code)
            raise

    async def _accept(
        request: Request,
        body: dict[str, Any],
        picture: bytes | None,
        remixed: Job | None = None,
        source: VideoRequest | None = None,
    ) -> Response:
        """Make a job of a body, unless there is one already."""
        wish, unknown = read_video(body, context.config.unknown_fields)
        runner, owner, key = _runner(context), _owner(request), _idempotency_key(request)
        remixed_id = None if remixed is None else remixed.id
        digest = await asyncio.to_thread(body_hash, wish, picture, remixed_id or "")
        job = await _known(request, runner, owner, key, digest)
        if job is None:
            png = None if picture is None else await pictures.decode(picture)
            settled = settle(wish, context, owner, png, source)
            exchange: Exchange = request.scope["state"]["exchange"]
            enhanced = await enhance(wish, settled, context, exchange)
            if enhanced.revision is not None:
                revised = enhanced.applied(wish, settled, guided=is_guided(settled, context))
                settled = settle(revised, context, owner, png, source)
            job = make_job(
                *(wish, settled, context, owner, enhanced),
                body_hash=digest,
                idempotency_key=key,
                remixed_from=remixed_id,
            )
            job = await runner.add(job, settled)
        headers = {"x-mmgen-warning": "unknown fields ignored: " + ", ".join(unknown)} if unknown else {}
        return JSONResponse(_view(runner.current(job)), headers=headers)

    async def _find(request: Request, video_id: str) -> Job:
        """The owner's job of that id, as it is now. Raises: NotFound."""
        runner = _runner(context)
        job = await runner.disk(runner.jobs.find, video_id, _owner(request))
        if job is None or _expired(job):
            raise _not_found(video_id)
        return runner.current(job)

    def _view(job: Job) -> dict[str, Any]:
        runner = _runner(context)
        return view(runner.current(job), runner.queue.position(job))

    return routes


def _runner(context: Context) -> JobRunner:
    """Raises: UnsupportedEndpoint where the model makes no videos."""
    if context.jobs is None:
        context.engine.check_side("pictures")
        raise UnsupportedEndpoint(f"{context.model_name} makes images; use POST /v1/images/generations.")
    return context.jobs


def _owner(request: Request) -> str:
    exchange: Exchange = request.scope["state"]["exchange"]
    return exchange.owner


async def _known(request: Request, runner: JobRunner, owner: str, key: str | None, digest: str) -> Job | None:
    """The job that an earlier sending of the same request has made. Raises: IdempotencyMismatch."""
    job = None
    if key is not None:
        job = await runner.disk(runner.jobs.find_key, owner, key, digest)
    elif request.headers.get("x-stainless-retry-count", "0") != "0":
        # The openai client says so when it sends a request again because an answer did not arrive.
        job = await runner.disk(runner.jobs.find_resent, owner, digest, int(time.time()))
    if job is not None and _expired(job):
        await runner.delete(job)
        return None
    return job


def _expired(job: Job) -> bool:
    return job.expires_at is not None and job.expires_at <= time.time()


def _announced(request: Request, context: Context) -> int:
    """Bytes that the body may have: what the client says, which the guard has checked, or the most that is read."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdigit() else body_limit(VIDEOS_PATH, context.config)


async def _body(request: Request, pictures: Pictures) -> dict[str, Any]:
    """The fields of a JSON object or of a form. Raises: InvalidJson, InvalidMultipart, the InvalidValue family."""
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/"):
        raw = await request.body()
        return parse_object(raw) if len(raw) < LARGE_BODY else await asyncio.to_thread(parse_object, raw)
    try:
        return fields_of(await read_form(kind, request.stream(), pictures.max_bytes))
    except InvalidImage as error:
        error.param = PICTURE
        raise


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidValue(
            "Idempotency-Key must be 1 to 255 printable ASCII characters without spaces.", param="Idempotency-Key"
        )
    return key


def _query(request: Request, known: tuple[str, ...]) -> dict[str, str]:
    query = request.query_params
    for name in query:
        if name not in known:
            raise UnknownParameter(
                f"Unknown query field {name[:64]!a}.{did_you_mean(name[:64], known)}", param=name[:64]
            )
    return dict(query)


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_PAGE
    if not _WHOLE.fullmatch(text) or not 1 <= int(text) <= MAX_PAGE:
        raise InvalidValue(f"'limit' must be between 1 and {MAX_PAGE}, got {text[:40]!a}.", param="limit")
    return int(text)


def _newest_first(text: str | None) -> bool:
    if text not in (None, "asc", "desc"):
        raise InvalidValue("'order' must be 'asc' or 'desc'.", param="order")
    return text != "asc"


def _variant(text: str) -> Variant:
    found = next((variant for variant in _VARIANTS if variant == text), None)
    if found is None:
        raise InvalidValue(f"'variant' must be one of {', '.join(_VARIANTS)}, got {text[:40]!a}.", param="variant")
    return found


def _index(text: str, job: Job) -> int:
    if not _WHOLE.fullmatch(text) or int(text) >= job.outputs:
        raise InvalidValue(
            f"'index' must be between 0 and {job.outputs - 1}, got {text[:40]!a}: the request asked for {job.outputs} "
            "video(s).",
            param="index",
        )
    return int(text)


def _not_ready(job: Job) -> VideoNotReady:
    if job.status == "failed":
        return VideoNotReady(f"The video failed ({job.error_code}), so there is no file: {job.error_message}")
    return VideoNotReady(
        f"The video is {job.status.replace('_', ' ')} ({job.progress} %); ask again when it is completed."
    )


def _not_found(video_id: str) -> NotFound:
    return NotFound(f"There is no video {video_id[:64]!a}; it may have been deleted, or have expired.")
