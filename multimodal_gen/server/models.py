"""`GET /v1/models`: the one model that this server has loaded."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter

from multimodal_gen.errors import ModelNotFound, did_you_mean
from multimodal_gen.server.context import Context
from multimodal_gen.server.errors import ERROR_RESPONSES
from multimodal_gen.server.memory import memory_view


def router(context: Context) -> APIRouter:
    """The model routes of one server."""
    routes = APIRouter(tags=["models"], responses=ERROR_RESPONSES)

    @routes.get("/v1/models", summary="List models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe(context)]}

    @routes.get("/v1/models/{model_id:path}", summary="One model")
    async def one_model(model_id: str) -> dict[str, Any]:
        check_model(model_id, context)
        return _describe(context)

    return routes


def check_model(name: str | None, context: Context) -> None:
    """Raises: ModelNotFound unless the name is absent or the served model's. Nothing is ever loaded on request."""
    names = (context.model_name, context.card.name)
    if name is None or name in names:
        return
    raise ModelNotFound(
        f"This server does not serve {name[:100]!a}.{did_you_mean(name[:100], names)} It serves {names[0]!r}; leave "
        "'model' out to use it.",
        param="model",
    )


def _describe(context: Context) -> dict[str, Any]:
    card, ready = context.card, context.engine.ready
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.started_at,
        "owned_by": "multimodal_gen",
        "task": card.task,
        "family": card.family,
        "device": ready.device if ready else None,
        "dtype": ready.dtype if ready else None,
        "defaults": msgspec.to_builtins(card.defaults),
        "parameters": sorted(card.parameters),
        "adapter_targets": list(ready.targets) if ready else None,
        "memory": memory_view(context),
        "limits": {
            "size_multiple": card.size_multiple,
            "min_side": card.min_side,
            "max_side": card.max_side,
            "max_sequence_length": card.max_sequence_length,
            "max_request_cost": context.config.max_request_cost,
            **(msgspec.to_builtins(card.video) if card.video is not None else {}),
        },
    }
