"""An answer that comes as server-sent events: what all such answers have in common."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import TYPE_CHECKING, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from multimodal_gen.errors import Cancelled, MmgenError
from multimodal_gen.server.context import Context
from multimodal_gen.server.disconnect import unless_gone
from multimodal_gen.server.errors import internal_error
from multimodal_gen.server.metrics import outcome_of_error

if TYPE_CHECKING:
    from multimodal_gen.engine.ticket import AnyTicket
    from multimodal_gen.server.guard import Exchange

T = TypeVar("T")

log = logging.getLogger("multimodal_gen.server")

# Proxies close connections that are silent for a minute.
SILENCE_S = 10.0
# Events that wait for a client. Beyond the first number it must take some, beyond the second it is too late.
MAX_BEHIND, FAR_BEHIND = 2_048, 65_536
LOOK_S = 1.0


class EventStream(Response):
    """The streaming answer to one request. Errors after its start travel as events."""

    def __init__(
        self, context: Context, exchange: Exchange, tickets: Sequence[AnyTicket], headers: dict[str, str]
    ) -> None:
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.context = context
        self.exchange = exchange
        self.tickets = tickets
        self._sent = 0  # parts that the client's connection has taken

    @abstractmethod
    def parts(self) -> AsyncIterator[bytes]:
        """The events, as they come."""

    @abstractmethod
    def error_part(self, error: MmgenError) -> bytes:
        """The event that tells of an error; the last one."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. The request is cancelled as soon as the client is gone, or takes nothing any more."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with self.context.running.hold(self.exchange.owner, self.exchange.request_id, *self.tickets):
                await unless_gone(self._unless_stuck(self._send_all(send)), receive)
        except Cancelled:  # the client is gone: there is nobody to tell
            self.exchange.outcome = "cancelled"
            self.context.metrics.cancelled()
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _unless_stuck(self, work: Coroutine[None, None, T]) -> T:
        """What the client does not take is kept here: not for long, and not without end."""
        task = asyncio.ensure_future(work)
        try:
            while True:
                sent = self._sent
                done, _ = await asyncio.wait({task}, timeout=LOOK_S)
                if done:
                    return task.result()
                behind = max(ticket.behind for ticket in self.tickets)
                if behind > FAR_BEHIND or (behind > MAX_BEHIND and sent == self._sent):
                    log.warning("%s: its client does not read the stream and is cut off", self.exchange.request_id)
                    raise Cancelled("The client does not read its stream.")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        try:
            async for part in self.parts():
                await send({"type": "http.response.body", "body": part, "more_body": True})
                self._sent += 1
        except MmgenError as error:
            self.exchange.outcome = outcome_of_error(error)
            await self._send_error(error, send)
        except Exception:
            log.exception("%s failed while streaming", self.exchange.request_id)
            self.exchange.outcome = "error"
            await self._send_error(internal_error(), send)

    async def _send_error(self, error: MmgenError, send: Send) -> None:
        for ticket in self.tickets:
            ticket.cancel()
        if isinstance(error, Cancelled):
            self.context.metrics.cancelled()
        await send({"type": "http.response.body", "body": self.error_part(error), "more_body": True})


async def never_silent(events: AsyncIterator[T]) -> AsyncIterator[T | None]:
    """The events, and None whenever there was none for a while."""
    waiting: asyncio.Task[T] | None = None
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


async def _next(events: AsyncIterator[T]) -> T:
    return await anext(events)
