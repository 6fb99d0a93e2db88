"""Requests for text to a real server."""

from __future__ import annotations

import json
from typing import Any

import httpx2

from tests.support.server import Server

MODEL = "smollm2"
PARIS = "What is the capital of France?"
QUICK_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": PARIS}], "max_tokens": 8, "temperature": 0}


def post(server: Server, path: str, body: object, **headers: str) -> httpx2.Response:
    """POST: a dict goes as JSON, bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.client.post(
        server.base_url + path,
        content=content,
        headers={"content-type": "application/json", **server.headers, **headers},
    )


def chat(server: Server, content: str = PARIS, **fields: Any) -> dict[str, Any]:
    """One good answer, greedy where nothing else is said."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 16, "temperature": 0, **fields}
    response = post(server, "/v1/chat/completions", body)
    assert response.status_code == 200, response.text[:500]
    answer = response.json()
    assert isinstance(answer, dict)
    return answer


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", text[-500:]
    return [json.loads(line) for line in lines[:-1]]


def idle(server: Server) -> bool:
    """Whether no text runs, waits, or holds pages."""
    return (
        server.metric("mmgen_text_running") == 0
        and server.metric("mmgen_text_waiting") == 0
        and server.metric('mmgen_text_kv_pages{state="used"}') == 0
    )
