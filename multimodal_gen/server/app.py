"""The ASGI application: routes over one engine, with the guard around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from multimodal_gen.config import ServerConfig
from multimodal_gen.server import (
    chat,
    completions,
    docs_page,
    health,
    images,
    loras,
    memory,
    models,
    text_loras,
    tokenize,
    videos,
)
from multimodal_gen.server.context import Context, main_name
from multimodal_gen.server.errors import install_handlers
from multimodal_gen.server.guard import Guard
from multimodal_gen.server.metrics import Metrics
from multimodal_gen.version import __version__

if TYPE_CHECKING:
    from multimodal_gen.engine.client import EngineClient
    from multimodal_gen.engine.job_runner import JobRunner
    from multimodal_gen.llm.front import TextFront


def create_app(
    config: ServerConfig, engine: EngineClient, jobs: JobRunner | None = None, text: TextFront | None = None
) -> FastAPI:
    """The application over an engine, the jobs of a model of videos and the front of a language model, that somebody
    else starts and stops."""
    metrics = Metrics(engine, main_name(engine.cards, config), jobs)
    context = Context(config, engine, metrics, jobs, text)
    if jobs is not None:
        jobs.observer = metrics

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        context.encoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="multimodal_gen",
        version=__version__,
        description=f"{_what(engine)} with {engine.cards.name}, for any OpenAI client.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    install_handlers(app)
    app.add_middleware(Guard, config=config, metrics=metrics)
    rooms = (images, videos, chat, completions, tokenize, loras, text_loras, models, memory, health)
    for routes in (*(room.router(context) for room in rooms), docs_page.router(app)):
        app.include_router(routes)
    return app


def _what(engine: EngineClient) -> str:
    pictures, text = engine.cards.pictures, engine.cards.text
    made = [] if pictures is None else [f"{pictures.media}s"]
    return " and ".join(made + ([] if text is None else ["text"])).capitalize()
