"""Sleep and wake over HTTP, and what operators see of the weights' memory."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from multimodal_gen.offload import WeightsPlan
from multimodal_gen.server.context import Context
from multimodal_gen.server.errors import ERROR_RESPONSES
from multimodal_gen.server.json_body import read_fields


def router(context: Context) -> APIRouter:
    """The routes that give the memory back and take it again."""
    routes = APIRouter(tags=["operation"], responses=ERROR_RESPONSES)

    @routes.post("/v1/sleep", summary="Give the model's memory back", openapi_extra=_NO_FIELDS)
    async def sleep(request: Request) -> dict[str, Any]:
        await read_fields(request, ())
        began = time.monotonic()
        falling_asleep = context.engine.sleep()
        if context.jobs is not None:
            await context.jobs.rest()
        done = await falling_asleep
        return {"status": "asleep", "freed_bytes": done.freed_bytes, "seconds": round(time.monotonic() - began, 4)}

    @routes.post("/v1/wake", summary="Bring the model back", openapi_extra=_NO_FIELDS)
    async def wake(request: Request) -> dict[str, Any]:
        await read_fields(request, ())
        began = time.monotonic()
        await context.engine.wake()
        seconds = round(time.monotonic() - began, 4)
        return {"status": "ready", "device_bytes": context.engine.weights.device_bytes, "seconds": seconds}

    return routes


def memory_view(context: Context) -> dict[str, Any] | None:
    """The `memory` of a model; None until it is loaded."""
    engine = context.engine
    if engine.ready is None:
        return None
    plan, use = engine.ready.plan, engine.weights
    return {
        "asleep": engine.state == "asleep",
        **_planned(plan),
        "device_bytes": use.device_bytes,
        "tiers": use.tiers,
        "moved_bytes": use.moved_bytes,
        "stall_seconds": round(use.stall_seconds, 4),
    }


def _planned(plan: WeightsPlan | None) -> dict[str, Any]:
    names = ("slots", "slot_bytes", "peak_bytes", "limit_bytes", "host_bytes", "pinned_bytes")
    if plan is None:
        return {"components": None, **dict.fromkeys(names)}
    components = {
        name: {"residency": residency, "resident_layers": plan.resident_layers.get(name)}
        for name, residency in plan.residency.items()
    }
    values = (plan.slots, plan.slot_bytes, plan.peak_bytes, plan.limit_bytes, plan.host_bytes, plan.pinned_bytes)
    return {"components": components, **dict(zip(names, values, strict=True))}


_NO_FIELDS: dict[str, Any] = {
    "requestBody": {"content": {"application/json": {"schema": {"type": "object", "properties": {}}}}}
}
