"""A server with a key, an allowed host and an allowed page (abuse items 40 to 42, 12 in its lenient form)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx2
import openai
import pytest

from tests.support.server import QUICK, Server, assert_error, http, start_server

pytestmark = [pytest.mark.api]

KEY = "correct-horse-battery-staple"
PATH = "/v1/images/generations"
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """Bound to all addresses, with a key."""
    flags = ("--host", "0.0.0.0", "--allowed-hosts", "images.example", "--allowed-origins", PAGE)
    with start_server(*flags, "--served-model-name", "house", "--unknown-fields", "warn", api_key=KEY) as server:
        yield server


def test_every_route_but_health_needs_the_key(locked: Server) -> None:
    schema = locked.get("/openapi.json").json()
    others = ["/docs", "/openapi.json", "/nothing", "/", "/health/", "//health", "/HEALTH", "/health/x"]
    paths = [*schema["paths"], *others]
    for path in paths:
        status = locked.exchange(http("GET", path)).status
        assert status == (200 if path in ("/health", "/health/live", "/health/ready") else 401), path
    for method in ("POST", "DELETE", "PUT", "OPTIONS", "HEAD", "TRACE", "FOO"):
        answer = locked.exchange(http(method, "/v1/models", content_length="0", connection="close"))
        assert answer.status == 401, method


@pytest.mark.parametrize(
    "value",
    [
        b"Bearer wrong",
        b"Bearer",
        b"Bearer ",
        b"",
        KEY.encode(),
        b"Basic " + KEY.encode(),
        b"Bearer " + KEY[:-1].encode(),
        b"Bearer " + KEY.encode() + b"x",
        b"Bearer " + KEY.upper().encode(),
        b"Bearer \xff\xfe" + KEY.encode(),
        b"Bearer " + "ключ".encode(),
        b"Bearer " + b"k" * 1_000_000,
        b"Bearer " + KEY.encode() + b"\r\nauthorization: Bearer wrong",
    ],
    ids=lambda value: repr(value[:30]),
)
def test_wrong_keys(locked: Server, value: bytes) -> None:
    data = http("GET", "/v1/models").replace(b"\r\n\r\n", b"\r\nauthorization: " + value + b"\r\n\r\n", 1)
    answer = locked.exchange(data)
    assert_error(answer, 401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert KEY not in answer.body.decode()


def test_forged_hosts_do_not_open_routes(locked: Server) -> None:
    for host in ("a/?x=", "127.0.0.1/health", "127.0.0.1/health?", "health/live"):
        assert locked.exchange(http("GET", "/v1/models", host=host)).status in (400, 401), host


def test_the_key_is_checked_before_the_body_is_read(locked: Server) -> None:
    started = time.monotonic()
    answer = locked.exchange(http("POST", PATH, content_type="application/json", content_length="1000"))
    assert_error(answer, 401, "invalid_api_key")
    assert time.monotonic() - started < 2


def test_right_key(locked: Server) -> None:
    client = openai.OpenAI(base_url=locked.base_url + "/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list().data] == ["house"]
    answer = client.images.generate(model="house", prompt="a cat", size="64x64", extra_body={"num_inference_steps": 1})
    assert answer.data
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=locked.base_url + "/v1", api_key="x", max_retries=0).models.list()


def test_served_name_and_own_name(locked: Server) -> None:
    for name in ("house", "emoji-image"):
        response = locked.post({**QUICK, "model": name})
        assert response.status_code == 200
        assert response.json()["model"] == "house"


def test_unknown_fields_as_warnings(locked: Server) -> None:
    response = locked.post({**QUICK, "promt": "x", "Ünknown\r\nx-evil: 1": 2})
    assert response.status_code == 200
    assert response.headers["x-mmgen-warning"].startswith("unknown fields ignored: 'promt', '\\xdcnknown\\r\\n")
    assert "x-evil" not in response.headers
    assert len(response.json()["warnings"]) == 2
    assert "'promt' was ignored" in locked.post({**QUICK, "promt": "x", "stream": True}).text
    assert_error(locked.post({**QUICK, "style": "vivid"}), 400, "unsupported_parameter", "style")


def test_allowed_page(locked: Server) -> None:
    preflight = locked.exchange(http("OPTIONS", PATH, origin=PAGE, access_control_request_method="POST"))
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    answer = locked.exchange(http("GET", "/v1/models", origin=PAGE, authorization=f"Bearer {KEY}"))
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["vary"] == "origin"
    unauthorised = locked.exchange(http("GET", "/v1/models", origin=PAGE))
    assert unauthorised.status == 401
    other = locked.exchange(http("GET", "/v1/models", origin="https://other.example", authorization=f"Bearer {KEY}"))
    assert_error(other, 403, "origin_not_allowed")


def test_allowed_host(locked: Server) -> None:
    for host, status in (("images.example", 200), ("IMAGES.example:8080", 200), ("other.example", 403)):
        answer = locked.exchange(http("GET", "/v1/models", host=host, authorization=f"Bearer {KEY}"))
        assert answer.status == status, host


def test_cancelling_needs_the_key(locked: Server) -> None:
    response = httpx2.delete(f"{locked.base_url}{PATH}/some-id")
    assert response.status_code == 401


def test_the_key_is_nowhere_in_the_log(locked: Server) -> None:
    locked.exchange(http("POST", PATH, json.dumps(QUICK).encode(), authorization=f"Bearer {KEY}"))
    assert locked.logged(PATH)
    assert KEY not in locked.log
    assert str(QUICK["prompt"]) not in locked.log.replace("a red apple\"}'", "")
