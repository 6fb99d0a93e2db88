"""The HTTP side of `mmgen serve`: the application under uvicorn, with bounds on connections.

Importing it takes most of the front's start; `run` does so while the workers start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from multimodal_gen.config import ServerConfig
from multimodal_gen.errors import CapacityError
from multimodal_gen.server.app import create_app
from multimodal_gen.server.errors import error_response
from multimodal_gen.server.protocol import Limits, guarded
from multimodal_gen.server.security import OPEN_PATHS, request_id

if TYPE_CHECKING:
    from multimodal_gen.engine.client import EngineClient
    from multimodal_gen.engine.job_runner import JobRunner
    from multimodal_gen.llm.front import TextFront

KEEP_ALIVE_S = 30
# After the engine has drained, answers only have to be sent.
FINISH_SENDING_S = 5


def front(config: ServerConfig, engine: EngineClient, jobs: JobRunner | None, text: TextFront | None) -> uvicorn.Server:
    """A server that is ready to serve."""
    app = create_app(config, engine, jobs, text)
    limits = Limits(
        connections=config.max_connections,
        read_timeout_s=config.body_timeout_s,
        write_timeout_s=config.body_timeout_s,
    )
    settings = uvicorn.Config(
        app,
        http=guarded(limits, _overloaded(app, config)),
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,  # the guard logs requests, with their ids
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=FINISH_SENDING_S,
    )
    return _Front(settings)


class _Front(uvicorn.Server):
    """uvicorn without its signal handlers: a signal must drain the engine before the front stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _overloaded(app: ASGIApp, config: ServerConfig) -> ASGIApp:
    """What connections beyond the limit get: health checks as ever, a 503 for everything else."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS:
            await app(scope, receive, send)
            return
        error = CapacityError(
            f"The server has {config.max_connections} open connections, which is --max-connections.", retry_after=1.0
        )
        response = error_response(error)
        response.headers["connection"] = "close"
        response.headers["x-request-id"] = request_id(scope["headers"])
        await response(scope, receive, send)

    return answer
