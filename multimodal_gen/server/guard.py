"""The outermost layer: every request passes its checks, every answer gets its headers, every mistake its 500."""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multimodal_gen.config import ServerConfig
from multimodal_gen.errors import MmgenError
from multimodal_gen.server import security
from multimodal_gen.server.body import BoundedBody
from multimodal_gen.server.context import fingerprint
from multimodal_gen.server.errors import error_response, internal_error
from multimodal_gen.server.metrics import Metrics, outcome_of_error

log = logging.getLogger("multimodal_gen.server")

CORS_METHODS = "GET, POST, DELETE"
CORS_HEADERS = "authorization, content-type, x-request-id, x-routing-key, idempotency-key, range"
EXPOSED_HEADERS = "x-request-id, retry-after, x-mmgen-warning, openai-poll-after-ms, accept-ranges, content-range, etag"


class Exchange:
    """One request and its answer: what the routes may know (`scope["state"]["exchange"]`) and report."""

    def __init__(self, request_id: str, owner: str) -> None:
        self.request_id = request_id
        self.owner = owner  # fingerprint of the API key
        self.admin = False  # whether it may change the server for everybody
        self.status = 0
        self.outcome = ""  # set for errors; a stream's status says nothing
        self.routing_key: str | None = None  # of text requests that go well together
        self.origin: str | None = None  # a foreign origin that may read the answer

    def work_id(self) -> str:
        """A new id for work of this request in the engine. Clients choose request ids, which may repeat; the engine's
        must not, and its log and status lines must show whose work it is."""
        return f"{self.request_id}/{secrets.token_hex(6)}"


class Guard:
    """Pure ASGI middleware."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics) -> None:
        self.app = app
        self.config = config
        self.metrics = metrics
        self.nobody = fingerprint("")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; anything that is not HTTP (the lifespan) passes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = scope["headers"]
        exchange = Exchange(security.request_id(headers), self.nobody)
        scope.setdefault("state", {})["exchange"] = exchange
        body = BoundedBody(
            receive,
            expected=security.has_body(headers),
            limit=security.body_limit(scope["path"], self.config),
            timeout_s=self.config.body_timeout_s,
            bytes_per_second=security.bytes_per_second(scope["path"]),
        )
        answer = _Answer(exchange, body, send)
        try:
            await self._serve(scope, exchange, body, answer)
        finally:
            seconds = time.perf_counter() - started
            self.metrics.request_done(_endpoint(scope), exchange.status, exchange.outcome, seconds)
            path = scope["path"][:200]
            # %a: line breaks of a path must not become lines of the log.
            log.info("%s %s %a %d %.3fs", exchange.request_id, scope["method"], path, exchange.status, seconds)

    async def _serve(self, scope: Scope, exchange: Exchange, body: BoundedBody, answer: _Answer) -> None:
        try:
            early = self._check(scope, exchange)
            await (early or self.app)(scope, body, answer)
        except MmgenError as error:
            exchange.outcome = outcome_of_error(error)
            if not answer.started:
                await error_response(error)(scope, body, answer)
        except Exception:
            log.exception("%s failed", exchange.request_id)
            if answer.started:
                raise  # the server closes the connection: the client must not take half an answer for a whole one
            await error_response(internal_error())(scope, body, answer)

    def _check(self, scope: Scope, exchange: Exchange) -> Response | None:
        """Raises the error of the first check that fails; returns the answer to a browser's preflight."""
        headers, method = scope["headers"], scope["method"]
        host = security.check_host(headers, self.config)
        exchange.origin = security.check_origin(headers, host, self.config)
        asked = security.get(headers, b"access-control-request-method")
        if exchange.origin is not None and method == "OPTIONS" and asked is not None:
            return Response(status_code=204, headers=_PREFLIGHT)
        key = security.check_key(headers, scope["path"], self.config)
        exchange.owner = fingerprint(key)
        exchange.admin = self.config.admin_api_key in (None, key)
        exchange.routing_key = security.routing_key(headers)
        path = scope["path"]
        security.check_body_headers(method, path, headers, security.body_limit(path, self.config))
        return None


_PREFLIGHT = {
    "access-control-allow-methods": CORS_METHODS,
    "access-control-allow-headers": CORS_HEADERS,
    "access-control-max-age": "600",
}


class _Answer:
    """An ASGI `send` that adds the headers of every answer, and closes connections whose body was not read."""

    def __init__(self, exchange: Exchange, body: BoundedBody, send: Send) -> None:
        self.started = False
        self._exchange = exchange
        self._body = body
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._exchange.status = message["status"]
            message = {**message, "headers": [*message["headers"], *self._headers()]}
        elif not message.get("more_body", False) and not self._body.complete:
            await self._send({**message, "more_body": True})
            await self._body.discard()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"x-request-id", self._exchange.request_id.encode("ascii")),
            (b"x-content-type-options", b"nosniff"),
            (b"cache-control", b"no-store"),
        ]
        if not self._body.complete:
            headers.append((b"connection", b"close"))
        if self._exchange.origin is not None:
            headers += [
                (b"access-control-allow-origin", self._exchange.origin.encode("latin-1")),
                (b"access-control-expose-headers", EXPOSED_HEADERS.encode("ascii")),
                (b"vary", b"origin"),
            ]
        return headers


def _endpoint(scope: Scope) -> str:
    """The route's pattern: a label of bounded variety."""
    route: Any = scope.get("route")
    return "unknown" if route is None else str(route.path)
