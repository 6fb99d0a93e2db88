"""Sleep and wake over HTTP, for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx2
import psutil

from tests.support.server import Server


def order(
    server: Server, what: str, body: object | None = None, headers: Mapping[str, str] | None = None
) -> httpx2.Response:
    """POST /v1/sleep or /v1/wake."""
    return server.client.post(
        f"{server.base_url}/v1/{what}",
        content=b"" if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json", **server.headers, **(headers or {})},
    )


def sleep(server: Server) -> dict[str, Any]:
    """Put it to sleep; returns the answer."""
    return _done(order(server, "sleep"))


def wake(server: Server) -> dict[str, Any]:
    """Wake it; returns the answer."""
    return _done(order(server, "wake"))


def _done(response: httpx2.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def resident(server: Server) -> int:
    """Anonymous bytes of all workers: what no file could give back."""
    workers = [psutil.Process(pid) for pid in server.worker_pids()]
    return sum(int(worker.memory_info().rss) - int(worker.memory_info().shared) for worker in workers)
