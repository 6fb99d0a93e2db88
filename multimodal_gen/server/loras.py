"""Adapters over HTTP: set, merge, unmerge, list, upload, unload. Names and shapes of `set_lora` are SGLang's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from multimodal_gen.adapters import (
    AdapterInfo,
    Change,
    LoadLora,
    LoraState,
    SetLora,
    UnloadLora,
    check_alpha,
    check_nickname,
    merge_change,
    unmerge_change,
)
from multimodal_gen.errors import InvalidValue, UnknownParameter, did_you_mean
from multimodal_gen.lora.sources import make_source, server_roots, set_change
from multimodal_gen.messages import LorasChanged
from multimodal_gen.server.context import Context
from multimodal_gen.server.errors import ERROR_RESPONSES
from multimodal_gen.server.json_body import read_fields
from multimodal_gen.server.uploads import Uploads

SET_FIELDS = ("lora_nickname", "lora_path", "target", "strength", "merge_mode", "lora_alpha", "allow_partial")
MERGE_FIELDS = ("target", "strength")
UNMERGE_FIELDS = ("target",)
UPLOAD_FIELDS = ("nickname", "lora_alpha", "allow_partial")


def router(context: Context) -> APIRouter:
    """The adapter routes of one server."""
    routes = APIRouter(tags=["adapters"], responses=ERROR_RESPONSES)
    roots = server_roots(context.config.lora_root)
    received, arriving = Uploads(roots[0]), set[Path]()  # arriving: whole, and not loaded yet

    @routes.post("/v1/set_lora", summary="Make adapters the active ones", openapi_extra=_body(SET_FIELDS))
    async def set_lora(request: Request) -> dict[str, Any]:
        context.engine.check_side("pictures")
        fields = await read_fields(request, SET_FIELDS)
        change = await asyncio.to_thread(_set_change, fields, roots, context)  # it looks for files
        done = await _commit(change)
        return _answer(done, _set_message(change, done), roots)

    @routes.post("/v1/merge_lora_weights", summary="Merge the last set again", openapi_extra=_body(MERGE_FIELDS))
    async def merge(request: Request) -> dict[str, Any]:
        return await _change(merge_change(**await read_fields(request, MERGE_FIELDS)), "Successfully merged", "merged")

    @routes.post("/v1/unmerge_lora_weights", summary="Back to the base model", openapi_extra=_body(UNMERGE_FIELDS))
    async def unmerge(request: Request) -> dict[str, Any]:
        change = unmerge_change(**await read_fields(request, UNMERGE_FIELDS))
        return await _change(change, "Successfully unmerged", "inactive")

    @routes.get("/v1/list_loras", summary="Loaded and active adapters")
    async def list_loras() -> dict[str, Any]:
        return listing(context.engine.loras, roots)

    @routes.post("/v1/loras", summary="Upload an adapter", openapi_extra=_UPLOAD)
    async def upload(request: Request) -> dict[str, Any]:
        context.engine.check_side("pictures")
        wish = _upload_fields(request)
        path, size = await received.receive(request.stream())
        arriving.add(path)
        try:
            source = make_source(wish["nickname"], str(path), roots, wish["lora_alpha"], wish["allow_partial"])
            done = await _commit(LoadLora(source=source))
        finally:
            arriving.remove(path)
            received.discard_unused(context.engine.loras.loaded, arriving)
        info = next(info for info in done.state.loaded if info.nickname == wish["nickname"])
        return {"status": "ok", "bytes_received": size, **_describe(info, roots)}

    @routes.delete("/v1/loras/{nickname}", summary="Unload an adapter")
    async def unload(nickname: str) -> dict[str, Any]:
        return await _change(UnloadLora(nickname=nickname), f"Unloaded {nickname!a}", "unloaded")

    async def _change(change: Change, done_words: str, state_words: str) -> dict[str, Any]:
        done = await _commit(change)
        words = done_words if done.changed else f"Nothing to do: already {state_words}"
        return _answer(done, f"{words}.", roots)

    async def _commit(change: Change) -> LorasChanged:
        done = await context.engine.change_loras(change)
        received.discard_unused(context.engine.loras.loaded, arriving)
        return done

    return routes


def listing(state: LoraState, roots: Iterable[Path]) -> dict[str, Any]:
    """What `GET /v1/list_loras` says: SGLang's fields and more of ours."""
    infos = {info.nickname: info for info in state.loaded}
    active: dict[str, Any] = {}
    for tree in dict.fromkeys(pin.tree for pin in state.active):
        pins = [pin for pin in state.active if pin.tree == tree]
        nicknames, strengths = [pin.nickname for pin in pins], [pin.strength for pin in pins]
        merged = state.merged.get(tree, False)
        known = [infos[name] for name in nicknames if name in infos]
        active[tree] = [
            {
                "nickname": ",".join(nicknames),
                "nicknames": nicknames,
                "path": ",".join(_shown_path(info, roots) for info in known),
                "merged": merged,
                "mode": "merge" if merged else "dynamic",
                "asked": state.modes.get(tree, "auto"),
                "reason": state.reasons.get(tree, "missing since the worker restarted"),
                "strength": strengths[0] if len(strengths) == 1 else strengths,
                "strengths": strengths,
            }
        ]
    return {"loaded_adapters": [_describe(info, roots) for info in state.loaded], "active": active}


def _describe(info: AdapterInfo, roots: Iterable[Path]) -> dict[str, Any]:
    return {
        "nickname": info.nickname,
        "path": _shown_path(info, roots),
        "sha256": info.sha256,
        "digest": info.digest,
        "format": info.format,
        "rank": info.rank,
        "bytes": info.bytes,
        "modules": info.modules,
        "skipped": list(info.skipped),
        "merge_only": info.merge_only or None,
    }


def _shown_path(info: AdapterInfo, roots: Iterable[Path]) -> str:
    """Relative to the root it lies in, as clients write it; of a file that the operator named, only the name."""
    path = Path(info.path)
    for root in roots:
        if path.is_relative_to(root.resolve()):
            return str(path.relative_to(root.resolve()))
    return path.name


def _answer(done: LorasChanged, message: str, roots: Iterable[Path]) -> dict[str, Any]:
    return {
        "status": "ok",
        "message": message,
        "changed": done.changed,
        "seconds": round(done.seconds, 4),
        **listing(done.state, roots),
    }


def _set_message(change: SetLora, done: LorasChanged) -> str:
    if not done.changed:
        return "Nothing to do: exactly this is active already."
    if not change.uses:
        return "No adapter is active any more."
    parts = [f"{use.nickname} (target: {use.target}, strength: {use.strength:g})" for use in change.uses]
    return "Successfully set LoRA adapter(s): " + ", ".join(parts) + "."


def _set_change(fields: dict[str, Any], roots: tuple[Path, ...], context: Context) -> SetLora:
    if "lora_nickname" not in fields:
        raise InvalidValue("'lora_nickname' is missing.", param="lora_nickname")
    return set_change(
        fields["lora_nickname"],
        fields.get("lora_path"),
        _or(fields.get("target"), "all"),
        _or(fields.get("strength"), 1.0),
        fields.get("merge_mode"),
        alpha=fields.get("lora_alpha"),
        allow_partial=_flag(fields.get("allow_partial", False)),
        roots=roots,
        default_mode=context.config.lora_merge_mode,
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidValue("'allow_partial' must be true or false.", param="allow_partial")
    return value


def _upload_fields(request: Request) -> dict[str, Any]:
    query = request.query_params
    for name in query:
        if name not in UPLOAD_FIELDS:
            raise UnknownParameter(
                f"Unknown query field {name[:64]!a}.{did_you_mean(name[:64], UPLOAD_FIELDS)}", param=name[:64]
            )
    partial = query.get("allow_partial", "false")
    if partial not in ("true", "false"):
        raise InvalidValue("'allow_partial' must be true or false.", param="allow_partial")
    try:
        alpha = check_alpha(float(query["lora_alpha"])) if "lora_alpha" in query else None
    except ValueError as error:
        if isinstance(error, InvalidValue):
            raise
        raise InvalidValue("'lora_alpha' must be a positive number.", param="lora_alpha") from None
    return {
        "nickname": check_nickname(query.get("nickname"), "nickname"),
        "lora_alpha": alpha,
        "allow_partial": partial == "true",
    }


_ANY_OF = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_NUMBERS = {"oneOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "lora_nickname": _ANY_OF,
    "lora_path": {**_ANY_OF, "nullable": True},
    "target": _ANY_OF,
    "strength": _NUMBERS,
    "merge_mode": {"enum": ["auto", "merge", "dynamic", None]},
    "lora_alpha": _NUMBERS,
    "allow_partial": {"type": "boolean"},
}
_UPLOAD: dict[str, Any] = {
    "parameters": [
        {"name": name, "in": "query", "required": name == "nickname", "schema": {"type": "string"}}
        for name in UPLOAD_FIELDS
    ],
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
}


def _body(fields: tuple[str, ...]) -> dict[str, Any]:
    schema = {"type": "object", "properties": {name: _SCHEMAS[name] for name in fields}}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}
