"""Jobs as clients see them: OpenAI's video object and list, with what we add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from multimodal_gen.errors import BY_CODE, MmgenError
from multimodal_gen.messages import Gauges

if TYPE_CHECKING:
    from multimodal_gen.engine.jobs import Job

POLL_MS = 1000
MIN_POLL_MS, MAX_POLL_MS = 250, 5000


def view(job: Job, position: int | None) -> dict[str, Any]:
    """The video object; `position` is how many jobs come before it."""
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": job.created_at,
        "completed_at": job.completed_at if job.status == "completed" else None,
        "expires_at": job.expires_at,
        "prompt": job.prompt,
        "seconds": job.seconds,
        "size": job.size,
        "remixed_from_video_id": job.remixed_from,
        "error": _error(job),
        "queue_position": position,
        "output_format": job.output_format,
        **msgspec.json.decode(job.facts),
    }


def listing(videos: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """One page; the client asks for the next one with `last_id`."""
    return {
        "object": "list",
        "data": videos,
        "first_id": videos[0]["id"] if videos else None,
        "last_id": videos[-1]["id"] if videos else None,
        "has_more": more,
    }


def poll_after_ms(job: Job, gauges: Gauges | None) -> int:
    """When there may be news: about a step from now."""
    if job.status == "queued" or gauges is None:
        return POLL_MS
    return min(max(round(gauges.step_seconds * 1000), MIN_POLL_MS), MAX_POLL_MS)


def _error(job: Job) -> dict[str, Any] | None:
    if job.error_code is None:
        return None
    kind = BY_CODE.get(job.error_code, MmgenError)
    return {"code": job.error_code, "message": job.error_message, "type": kind.type, "param": None}
