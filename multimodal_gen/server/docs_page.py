"""`/docs`: the API on one static page, made from /openapi.json. No scripts and nothing from other hosts, so that it
works offline and behind a strict content security policy."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.responses import HTMLResponse

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
code { font-family: ui-monospace, monospace }
section { margin: 2.5rem 0 }
.method { font-weight: 700; margin-right: .5em }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884 }
"""
_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


def router(app: FastAPI) -> APIRouter:
    """The documentation route of `app`."""
    routes = APIRouter()

    @routes.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render(app.openapi()), headers=_HEADERS)

    return routes


def render(schema: dict[str, Any]) -> str:
    """The page for an OpenAPI schema."""
    title = escape(schema["info"]["title"])
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
        f'<h1>{title}</h1><p>{escape(schema["info"]["description"])} <a href="/openapi.json">openapi.json</a></p>',
    ]
    for path, methods in schema["paths"].items():
        parts += [_operation(method, path, operation) for method, operation in methods.items()]
    return "\n".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    head = f"<h2><code><span class=method>{method.upper()}</span>{escape(path)}</code></h2>"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    return f"<section>{head}<p>{escape(operation['summary'])}</p>{_fields(body) if body else ''}</section>"


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field))}{', required' if name in required else ''}"
        f"<td>{escape(field.get('description', ''))}"
        for name, field in schema["properties"].items()
    ]
    return f"<table><tr><th>Field<th>Type<th>Meaning{''.join(rows)}</table>"


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"] if option.get("type") != "null")
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    return f"list of {_type(field['items'])}" if field.get("type") == "array" else str(field.get("type", "any"))
