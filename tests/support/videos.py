"""Video jobs over HTTP, for tests."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx2

from tests.support.server import Server

# The smallest video worth making.
TINY: dict[str, Any] = {
    "prompt": "a red apple", "size": "64x64", "num_frames": 5, "num_inference_steps": 2, "seed": 1,
}  # fmt: skip
WAIT_S = 120.0


def post(server: Server, body: object, path: str = "/v1/videos", **headers: str) -> httpx2.Response:
    """POST JSON: a dict as JSON, bytes as they are; underscores in header names become hyphens."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    extra = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.client.post(
        server.base_url + path,
        content=content,
        headers={"content-type": "application/json", **server.headers, **extra},
    )


def post_form(server: Server, fields: dict[str, str], picture: bytes | None = None) -> httpx2.Response:
    """POST a form, as browsers and the openai client do."""
    files: dict[str, Any] = {name: (None, text) for name, text in fields.items()}
    if picture is not None:
        files["input_reference"] = ("../../x.py", picture, "image/png")
    return server.client.post(server.base_url + "/v1/videos", files=files, headers=server.headers)


def create(server: Server, **fields: Any) -> dict[str, Any]:
    """A new job."""
    response = post(server, {**TINY, **fields})
    assert response.status_code == 200, response.text[:500]
    job: dict[str, Any] = response.json()
    return job


def get(server: Server, video_id: str) -> dict[str, Any]:
    """A job as it is now."""
    response = server.get(f"/v1/videos/{video_id}")
    assert response.status_code == 200, response.text[:500]
    job: dict[str, Any] = response.json()
    return job


def wait(server: Server, video_id: str, *statuses: str, timeout_s: float = WAIT_S) -> dict[str, Any]:
    """The job once it has one of these statuses; completed or failed by default."""
    end = time.monotonic() + timeout_s
    while True:
        job = get(server, video_id)
        if job["status"] in (statuses or ("completed", "failed")):
            return job
        assert time.monotonic() < end, job
        time.sleep(0.02)


def download(server: Server, video_id: str, query: str = "", **headers: str) -> httpx2.Response:
    """GET the content."""
    return server.get(f"/v1/videos/{video_id}/content{query}", **headers)


def made(server: Server, **fields: Any) -> bytes:
    """The file of a new video."""
    job = wait(server, create(server, **fields)["id"])
    assert job["status"] == "completed", job
    return download(server, job["id"]).content


def delete(server: Server, video_id: str) -> httpx2.Response:
    """DELETE a job."""
    return server.client.delete(f"{server.base_url}/v1/videos/{video_id}", headers=server.headers)
