"""uvicorn's HTTP/1.1 protocol with a bound on everything that a client can make us hold or wait for.

uvicorn itself waits for ever for the rest of a request line or header, and for a client that stops reading; it
answers broken requests and overload in plain text.
"""

from __future__ import annotations

import asyncio
import http
from dataclasses import dataclass, replace
from typing import Any

import h11
import msgspec
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from multimodal_gen.errors import BodyTooLarge, MmgenError, RequestTimeout, UserError
from multimodal_gen.server.errors import error_body, error_headers
from multimodal_gen.server.security import request_id

# Above one megabyte: such a header must reach the checks, to be refused (a key) or replaced (a request id) there.
MAX_HEADER_BYTES = 1_536 * 1024
TINY_CHUNK_BYTES = 64
MAX_TINY_CHUNKS = 4096

# Connections beyond the limit are told so, within these bounds; beyond the spare ones nobody is told anything.
SPARE_CONNECTIONS = 64
OVERLOADED_HEADER_BYTES = 16 * 1024
OVERLOADED_S = 2


@dataclass(frozen=True)
class Limits:
    """Bounds of one server's connections."""

    connections: int
    read_timeout_s: float  # for a whole request head
    write_timeout_s: float  # without a byte taken by a client that does not read


class _Connection(h11.Connection):
    """Refuses bodies of very many very small chunks: each costs as much time as a large one."""

    tiny_chunks = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.tiny_chunks = 0
        elif isinstance(event, h11.Data) and len(event.data) < TINY_CHUNK_BYTES:
            self.tiny_chunks += 1
            if self.tiny_chunks > MAX_TINY_CHUNKS:
                raise h11.RemoteProtocolError("too many tiny chunks", error_status_hint=413)
        return event


class GuardedProtocol(H11Protocol):
    """Set `limits` and `overloaded` on a subclass (`guarded`)."""

    limits: Limits
    overloaded: ASGIApp

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.conn = _Connection(h11.SERVER, MAX_HEADER_BYTES)
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections + SPARE_CONNECTIONS:
            transport.close()
        elif len(self.connections) > self.limits.connections:
            self._serve_briefly()
        self._await_head()

    def _serve_briefly(self) -> None:
        self.app = self.overloaded
        self.conn = _Connection(h11.SERVER, OVERLOADED_HEADER_BYTES)
        self.limits = replace(self.limits, read_timeout_s=min(self.limits.read_timeout_s, OVERLOADED_S))
        self.timeout_keep_alive = min(self.timeout_keep_alive, OVERLOADED_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Bytes of a next request may have come with the last one.
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are not HTTP."""
        tiny = isinstance(self.conn, _Connection) and self.conn.tiny_chunks > MAX_TINY_CHUNKS
        if tiny:
            self._answer(BodyTooLarge("The body comes in too many tiny chunks."))
        else:
            self._answer(UserError("This is not a valid HTTP/1.1 request."))

    def _await_head(self) -> None:
        """Start the clock of a request's head, or stop it once the head is complete."""
        waiting = self.conn.our_state is h11.IDLE and not self.transport.is_closing()
        if waiting and self._read_timer is None:
            self._read_timer = self.loop.call_later(self.limits.read_timeout_s, self._head_timed_out)
        elif not waiting and self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _head_timed_out(self) -> None:
        self._read_timer = None
        if not self.conn.trailing_data[0]:
            self.transport.close()  # a connection opened in advance and never used
        elif not self.transport.is_closing():
            self._answer(RequestTimeout(f"No complete request arrived within {self.limits.read_timeout_s:g} s."))

    def _watch_writing(self) -> None:
        if self._write_timer is None:
            size = self.transport.get_write_buffer_size()
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self._check_writing, size)

    def _check_writing(self, size_before: int) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() >= size_before:
            self.transport.abort()
        else:
            self._watch_writing()

    def _answer(self, error: MmgenError) -> None:
        """Answer without the application, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = msgspec.json.encode(error_body(error))
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                "x-request-id": request_id(()),
                **error_headers(error),
            }
            head = [f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}"]
            head += [f"{name}: {value}" for name, value in headers.items()]
            self.transport.write("\r\n".join([*head, "", ""]).encode("ascii") + body)
        self.transport.close()

    def _cancel_timers(self) -> None:
        for timer in (self._read_timer, self._write_timer):
            if timer is not None:
                timer.cancel()


def guarded(limits: Limits, overloaded: ASGIApp) -> type[GuardedProtocol]:
    """The protocol class for one server. Connections beyond the limit are served by `overloaded`."""

    class Guarded(GuardedProtocol):
        pass

    Guarded.limits = limits
    Guarded.overloaded = staticmethod(overloaded)
    return Guarded
