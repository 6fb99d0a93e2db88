"""Adapters of the language model over HTTP: loaded from a path or from tensors, unloaded, and named by requests.

Names and fields are SGLang's, but for tensors: they come as the bytes of a safetensors file with their SHA-256, and
nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from multimodal_gen.adapters import AdapterSource, check_alpha, check_nickname
from multimodal_gen.engine.text_loras import Entry, Loading
from multimodal_gen.errors import AdminRequired, CorruptAdapter, InvalidValue, UnknownParameter, did_you_mean
from multimodal_gen.llm.adapter_names import is_name, source_of
from multimodal_gen.lora.sources import server_roots
from multimodal_gen.server.context import Context, fingerprint
from multimodal_gen.server.errors import ERROR_RESPONSES
from multimodal_gen.server.json_body import parse_object, read_fields
from multimodal_gen.server.lora_metrics import Origin
from multimodal_gen.server.multipart import FileForm
from multimodal_gen.server.uploads import Uploads, beside

if TYPE_CHECKING:
    from multimodal_gen.server.guard import Exchange

LOAD_FIELDS = ("lora_name", "lora_path", "pinned", "lora_alpha", "allow_partial")
TENSOR_FIELDS = ("lora_name", "config", "sha256", "pinned", "allow_partial")
UNLOAD_FIELDS = ("lora_name",)
FILE_FIELD = "tensors"

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_SWITCHES = {"true": True, "false": False}


def router(context: Context) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(tags=["text adapters"], responses=ERROR_RESPONSES)
    roots = server_roots(context.config.lora_root)
    received, arriving = Uploads(roots[0]), set[Path]()  # arriving: whole, and not loaded yet

    @routes.post("/v1/load_lora_adapter", summary="Load an adapter of the language model", openapi_extra=_LOAD)
    async def load(request: Request) -> dict[str, Any]:
        _ = context.text_card
        fields = await read_fields(request, LOAD_FIELDS)
        source = await asyncio.to_thread(_source, fields, roots)  # it looks for files
        return await _load(source, _flag(fields, "pinned"), "path")

    @routes.post("/v1/load_lora_adapter_from_tensors", summary="Load an adapter from tensors", openapi_extra=_TENSORS)
    async def load_tensors(request: Request) -> dict[str, Any]:
        _ = context.text_card
        form = FileForm(request.headers.get("content-type", ""), FILE_FIELD)
        hashed = _Hashed(form.file(request.stream()))
        path, size = await received.receive(hashed)
        mine = {path, beside(path)}
        arriving.update(mine)
        try:
            fields = _form_fields(form.texts)
            name = check_nickname(fields.get("lora_name"), "lora_name")
            _check_sum(fields.get("sha256"), hashed.sha256)
            await received.with_config(path, _config(fields.get("config", "{}")))
            source = source_of(name, str(beside(path)), roots, None, _flag(fields, "allow_partial"))
            answer = await _load(source, _flag(fields, "pinned"), "tensors")
        finally:
            arriving.difference_update(mine)
            _discard_unused()
        return {**answer, "bytes_received": size}

    @routes.post("/v1/unload_lora_adapter", summary="Unload an adapter of the language model", openapi_extra=_UNLOAD)
    async def unload(request: Request) -> dict[str, Any]:
        _ = context.text_card
        fields = await read_fields(request, UNLOAD_FIELDS)
        name = check_nickname(fields.get("lora_name"), "lora_name")
        done = await context.engine.text_loras.unload(name)
        _discard_unused()
        return {**_answer(f"Unloaded {name!a}.", True, done.seconds), **listing(_entries(), roots)}

    async def _load(source: AdapterSource, pinned: bool, origin: Origin) -> dict[str, Any]:
        loading = await _loaded(context, source, origin, pinned=pinned)
        _discard_unused()
        return {
            **_answer(_loaded_message(loading), loading.changed, loading.seconds),
            "evicted": list(loading.evicted),
            **listing(_entries(), roots),
        }

    def _discard_unused() -> None:
        received.discard_unused((entry.info for entry in _entries().values()), arriving)

    def _entries() -> dict[str, Entry]:
        return context.engine.text_loras.entries

    return routes


async def bring(path: str, context: Context, exchange: Exchange) -> str:
    """The name of the adapter that a request's `lora_path` means; one that is a path of a file is loaded if need be.

    Raises: AdapterNotFound, AdminRequired, PathNotAllowed; as `TextLoras.load`.
    """
    entries, roots = context.engine.text_loras.entries, server_roots(context.config.lora_root)
    if path in entries or (is_name(path) and not path.endswith(".safetensors")):
        return path
    if not exchange.admin:
        raise AdminRequired(
            "Naming an adapter by its file loads it for everybody, which needs the admin key (--admin-api-key) of this "
            "server; name one that is loaded.",
            param="lora_path",
        )
    name = f"{re.sub(r'[^A-Za-z0-9]+', '-', Path(path).stem)[:64].strip('-') or 'adapter'}@{fingerprint(path)[:8]}"
    source = await asyncio.to_thread(source_of, name, path, roots, None, False)
    known = entries.get(name)
    if known is None or known.info.source != source:
        await _loaded(context, source, "path")
    return name


async def _loaded(context: Context, source: AdapterSource, origin: Origin, *, pinned: bool = False) -> Loading:
    loading = await context.engine.text_loras.load(source, pinned=pinned)
    assert context.metrics.text_loras is not None, "a language model is served"
    context.metrics.text_loras.loaded(loading, origin)
    return loading


def listing(entries: Mapping[str, Entry], roots: Iterable[Path]) -> dict[str, Any]:
    """What is loaded: SGLang's `loaded_adapters`, and more of ours; the least recently used first."""
    shown = {name: _shown_path(entry, roots) for name, entry in entries.items()}
    return {
        "loaded_adapters": shown,
        "adapters": [
            {
                "name": name,
                "path": shown[name],
                "pinned": entry.pinned,
                "sha256": entry.info.sha256,
                "digest": entry.info.digest,
                "format": entry.info.format,
                "rank": entry.info.rank,
                "bytes": entry.info.bytes,
                "modules": sum(entry.info.modules.values()),
                "skipped": list(entry.info.skipped),
            }
            for name, entry in entries.items()
        ],
    }


class _Hashed:
    """Passes pieces on and hashes them."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of what was passed on, hexadecimal."""
        return self._digest.hexdigest()

    def __aiter__(self) -> _Hashed:
        return self

    async def __anext__(self) -> bytes:
        piece = await anext(self._pieces)
        # The hash lets go of the interpreter for pieces of this size.
        self._digest.update(piece)
        return piece


def _source(fields: Mapping[str, Any], roots: Sequence[Path]) -> AdapterSource:
    """Raises: InvalidValue, PathNotAllowed, AdapterNotFound, UnsafeFormat."""
    name = check_nickname(fields.get("lora_name"), "lora_name")
    alpha = check_alpha(fields.get("lora_alpha"))
    return source_of(name, fields.get("lora_path"), roots, alpha, _flag(fields, "allow_partial"))


def _form_fields(texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text in texts:
        if name not in TENSOR_FIELDS:
            raise UnknownParameter(
                f"Unknown field {name[:64]!a}.{did_you_mean(name[:64], TENSOR_FIELDS)}", param=name[:64]
            )
        if name in found:
            raise InvalidValue(f"{name!r} is there twice; which value is meant?", param=name)
        found[name] = _SWITCHES.get(text, text) if name in ("pinned", "allow_partial") else text
    return found


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise InvalidValue(f"{name!r} must be true or false.", param=name)
    return value


def _check_sum(given: Any, found: str) -> None:
    if not isinstance(given, str) or not _SHA256.fullmatch(given):
        raise InvalidValue("'sha256' must be the SHA-256 of the file, 64 hexadecimal digits.", param="sha256")
    if given.lower() != found:
        raise CorruptAdapter(
            f"The tensors have the SHA-256 {found}, not {given.lower()}: they were damaged on the way, or are not "
            "those that were meant. Send them again.",
            param="sha256",
        )


def _config(text: str) -> bytes:
    """peft's configuration. Raises: InvalidJson naming what is wrong with it."""
    return json.dumps(parse_object(text.encode())).encode() if text.strip() != "{}" else b"{}"


def _loaded_message(loading: Loading) -> str:
    if not loading.changed:
        return f"Nothing to do: exactly this is loaded as {loading.info.nickname!a} already."
    gone = f" {', '.join(loading.evicted)} had to leave." if loading.evicted else ""
    return f"Loaded {loading.info.nickname!a}.{gone}"


def _answer(message: str, changed: bool, seconds: float) -> dict[str, Any]:
    return {"status": "ok", "success": True, "message": message, "changed": changed, "seconds": round(seconds, 4)}


def _shown_path(entry: Entry, roots: Iterable[Path]) -> str:
    """Relative to the root it lies in, as clients write it; of a file that the operator named, only the name."""
    path = Path(entry.info.path)
    for root in roots:
        if path.is_relative_to(root.resolve()):
            return str(path.relative_to(root.resolve()))
    return path.name


_SCHEMAS: dict[str, dict[str, Any]] = {
    "lora_name": {"type": "string"},
    "lora_path": {"type": "string"},
    "pinned": {"type": "boolean"},
    "lora_alpha": {"type": "number"},
    "allow_partial": {"type": "boolean"},
    "config": {"type": "string", "description": "adapter_config.json"},
    "sha256": {"type": "string"},
    FILE_FIELD: {"type": "string", "format": "binary"},
}


def _body(kind: str, fields: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": {name: _SCHEMAS[name] for name in fields}, "required": list(required)}
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


_LOAD = _body("application/json", LOAD_FIELDS, ("lora_name", "lora_path"))
_UNLOAD = _body("application/json", UNLOAD_FIELDS, UNLOAD_FIELDS)
_TENSORS = _body("multipart/form-data", (*TENSOR_FIELDS, FILE_FIELD), ("lora_name", "sha256", FILE_FIELD))
