"""The ASGI application: routes over one engine, with the guard around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from multimodal_gen.config import ServerConfig
from multimodal_gen.server import docs_page, health, images, loras, memory, models, videos
from multimodal_gen.server.context import Context
from multimodal_gen.server.errors import install_handlers
from multimodal_gen.server.guard import Guard
from multimodal_gen.server.metrics import Metrics
from multimodal_gen.version import __version__

if TYPE_CHECKING:
    from multimodal_gen.engine.client import EngineClient
    from multimodal_gen.engine.job_runner import JobRunner


def create_app(config: ServerConfig, engine: EngineClient, jobs: JobRunner | None = None) -> FastAPI:
    """The application over an engine, and the jobs of models of videos, that somebody else starts and stops."""
    metrics = Metrics(engine, config.served_model_name or engine.card.name, jobs)
    context = Context(config, engine, metrics, jobs)
    if jobs is not None:
        jobs.observer = metrics

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        context.encoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="multimodal_gen",
        version=__version__,
        description=f"{engine.card.media.capitalize()}s with {context.model_name}, for any OpenAI client.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    install_handlers(app)
    app.add_middleware(Guard, config=config, metrics=metrics)
    rooms = (images, videos, loras, models, memory, health)
    for routes in (*(room.router(context) for room in rooms), docs_page.router(app)):
        app.include_router(routes)
    return app
