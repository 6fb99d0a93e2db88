"""`GET /v1/models`: the models that this server has loaded: one of pictures or videos, one of text, or both."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter

from multimodal_gen.errors import ModelNotFound, UnsupportedEndpoint, did_you_mean
from multimodal_gen.llm.adapter_names import SEPARATOR
from multimodal_gen.server.context import Context
from multimodal_gen.server.errors import ERROR_RESPONSES
from multimodal_gen.server.memory import memory_view
from multimodal_gen.text import MAX_CHOICES, MAX_LOGPROBS


def router(context: Context) -> APIRouter:
    """The model routes of one server."""
    routes = APIRouter(tags=["models"], responses=ERROR_RESPONSES)

    @routes.get("/v1/models", summary="List models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": list(_views(context).values())}

    @routes.get("/v1/models/{model_id:path}", summary="One model")
    async def one_model(model_id: str) -> dict[str, Any]:
        views = _views(context)
        cards = {card.name: card for card in (context.engine.cards.pictures, context.engine.cards.text) if card}
        if model_id in views:
            return views[model_id]
        if model_id in cards:
            return views[context.model_name if cards[model_id] is not context.engine.cards.text else context.text_name]
        raise ModelNotFound(
            f"This server does not serve {model_id[:100]!a}.{did_you_mean(model_id[:100], views)} It serves "
            f"{' and '.join(map(repr, views))}.",
            param="model",
        )

    return routes


def check_model(name: str | None, context: Context) -> None:
    """Whether a request for pictures or videos is for the model of those. Nothing is ever loaded on request.

    Raises: UnsupportedEndpoint where none is served, or the language model is named; ModelNotFound.
    """
    names = (context.model_name, context.card.name)
    if name is None or name in names:
        return
    if context.engine.cards.text is not None and name == context.text_name:
        raise UnsupportedEndpoint(f"{name} writes text; use POST /v1/chat/completions.", param="model")
    raise ModelNotFound(
        f"This server does not serve {name[:100]!a}.{did_you_mean(name[:100], names)} It serves {names[0]!r}; leave "
        "'model' out to use it.",
        param="model",
    )


def _views(context: Context) -> dict[str, dict[str, Any]]:
    """What is served, by id."""
    views = {}
    if context.engine.cards.pictures is not None:
        views[context.model_name] = _describe(context)
    if context.engine.cards.text is not None:
        views[context.text_name] = _describe_text(context)
        views |= {view["id"]: view for view in _adapters(context)}
    return views


def _describe_text(context: Context) -> dict[str, Any]:
    card, ready = context.text_card, context.engine.ready
    info = ready.text if ready else None
    return {
        "id": context.text_name,
        "object": "model",
        "created": context.started_at,
        "owned_by": "multimodal_gen",
        "task": "text-generation",
        "family": card.family,
        "device": info.device if info else None,
        "dtype": info.dtype if info else None,
        "defaults": msgspec.to_builtins(card.defaults),
        "chat": card.chat,
        "adapters": list(context.engine.text_loras.entries),
        "memory": {
            "asleep": context.engine.state == "asleep",
            "weight_bytes": info.weight_bytes if info else None,
            "kv_bytes": info.kv_bytes if info else None,
            "kv_pages": info.kv_pages if info else None,
            "kv_page_size": info.kv_page_size if info else None,
        },
        "limits": {
            "max_context": info.context if info else card.context,
            "max_choices": MAX_CHOICES,
            "max_logprobs": MAX_LOGPROBS,
            "max_running_requests": context.config.max_running_requests,
        },
    }


def _adapters(context: Context) -> list[dict[str, Any]]:
    """The language model with each of its adapters, under the ids by which requests name them."""
    return [
        {
            "id": f"{context.text_name}{SEPARATOR}{name}",
            "object": "model",
            "created": context.started_at,
            "owned_by": "multimodal_gen",
            "task": "text-generation",
            "parent": context.text_name,
            "adapter": {
                "name": name,
                "pinned": entry.pinned,
                "rank": entry.info.rank,
                "bytes": entry.info.bytes,
                "sha256": entry.info.sha256,
            },
        }
        for name, entry in context.engine.text_loras.entries.items()
    ]


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
        "defaults": {**msgspec.to_builtins(card.defaults), "step_cache": card.step_cache},
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
