"""A stream of image events: previews while the model works, the images at the end, progress as comments between."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, ParamSpec

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from multimodal_gen.errors import Cancelled, MmgenError
from multimodal_gen.media.maker import Maker
from multimodal_gen.messages import Event, Finished, Preview, Progress, Started
from multimodal_gen.server import replies
from multimodal_gen.server.context import Context
from multimodal_gen.server.disconnect import unless_gone
from multimodal_gen.server.errors import error_body, internal_error
from multimodal_gen.server.metrics import outcome_of_error
from multimodal_gen.server.replies import Form

if TYPE_CHECKING:
    from multimodal_gen.engine.ticket import Ticket
    from multimodal_gen.server.guard import Exchange

P = ParamSpec("P")

log = logging.getLogger("multimodal_gen.server")

# Proxies close connections that are silent for a minute.
SILENCE_S = 10.0


class ImageStream(Response):
    """The streaming answer to one request. Errors after its start travel as events with a top-level `error`."""

    def __init__(
        self,
        context: Context,
        exchange: Exchange,
        ticket: Ticket,
        form: Form,
        maker: Maker,
        warnings: list[str],
        headers: dict[str, str],
    ) -> None:
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.context = context
        self.exchange = exchange
        self.ticket = ticket
        self.form = form
        self.maker = maker
        self.warnings = warnings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; the request is cancelled as soon as the client is gone."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with self.context.running.hold(self.exchange.owner, self.exchange.request_id, self.ticket):
                await unless_gone(self._send_all(send), receive)
        except Cancelled:  # the client is gone: there is nobody to tell
            self.exchange.outcome = "cancelled"
            self.context.metrics.cancelled()
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        try:
            async for part in self._parts():
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except MmgenError as error:
            self.exchange.outcome = outcome_of_error(error)
            await self._send_error(error, send)
        except Exception:
            log.exception("%s failed while streaming", self.exchange.request_id)
            self.exchange.outcome = "error"
            await self._send_error(internal_error(), send)

    async def _send_error(self, error: MmgenError, send: Send) -> None:
        self.ticket.cancel()
        if isinstance(error, Cancelled):
            self.context.metrics.cancelled()
        part = replies.event_bytes("error", {"type": "error", **error_body(error)})
        await send({"type": "http.response.body", "body": part, "more_body": True})

    async def _parts(self) -> AsyncIterator[bytes]:
        request = self.ticket.request
        async for event in _never_silent(self.ticket):
            if event is None:
                yield replies.comment_bytes("waiting")
            elif isinstance(event, Started):
                yield replies.comment_bytes("started")
            elif isinstance(event, Progress):
                yield replies.comment_bytes(f"image {event.index} step {event.step}/{event.steps}")
            elif isinstance(event, Preview):
                yield await self._in_thread(replies.partial_event, request, event, self.form)
            elif isinstance(event, Finished):
                self.context.metrics.generated(event.timings, request.n)
                for index in range(request.n):
                    yield await self._in_thread(
                        replies.completed_event, request, event, index, self.form, self.maker, self.warnings
                    )

    async def _in_thread(self, make: Callable[P, bytes], *args: P.args, **kwargs: P.kwargs) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.context.encoders, partial(make, *args, **kwargs))


async def _never_silent(ticket: Ticket) -> AsyncIterator[Event | None]:
    """The ticket's events, and None whenever there was none for a while."""
    events = aiter(ticket)
    waiting: asyncio.Task[Event] | None = None
    try:
        while True:
            # Not wait_for: it would cancel, and so lose, an event that is just arriving.
            waiting = waiting or asyncio.ensure_future(_next(events))
            done, _ = await asyncio.wait({waiting}, timeout=SILENCE_S)
            if not done:
                yield None
                continue
            try:
                event = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield event
    finally:
        if waiting is not None:
            waiting.cancel()


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)
