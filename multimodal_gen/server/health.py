"""Health and metrics: what load balancers, orchestrators and Prometheus ask. None of it touches the queue."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse

from multimodal_gen.errors import Asleep, EngineError, MmgenError, ModelLoading, ShuttingDown
from multimodal_gen.server.context import Context, lost_adapters
from multimodal_gen.server.errors import ERROR_RESPONSES, error_body, error_headers

_WHY_NOT: dict[str, MmgenError] = {
    "loading": ModelLoading("The model is loading.", retry_after=5.0),
    "restarting": ModelLoading("The worker is restarting.", retry_after=5.0),
    "asleep": Asleep("The model is asleep: its memory is given back. POST /v1/wake brings it back."),
    "waking": ModelLoading("The model is waking up.", retry_after=5.0),
    "draining": ShuttingDown("The server is shutting down."),
    "stopped": ShuttingDown("The server has shut down."),
}


def router(context: Context) -> APIRouter:
    """The operators' routes of one server."""
    routes = APIRouter(tags=["operation"], responses=ERROR_RESPONSES)

    @routes.get("/health/live", summary="Is the process alive?")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @routes.get("/health", summary="Same as /health/ready")
    @routes.get("/health/ready", summary="Are requests accepted?")
    async def ready() -> Response:
        state = context.engine.state
        if state == "ready" and context.engine.loras.missing:
            lost = lost_adapters(context.engine.loras)
            return JSONResponse({"status": "adapters missing", **error_body(lost)}, 503, headers=error_headers(lost))
        if state == "ready":
            return JSONResponse({"status": "ready"})
        error = _WHY_NOT.get(state, EngineError("The engine has failed; the server is about to exit."))
        return JSONResponse({"status": state, **error_body(error)}, status_code=503, headers=error_headers(error))

    @routes.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(context.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return routes
