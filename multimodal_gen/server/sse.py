"""A stream of image events: previews while the model works, the images at the end, progress as comments between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, ParamSpec

from multimodal_gen.errors import MmgenError
from multimodal_gen.media.maker import Maker
from multimodal_gen.messages import Finished, Preview, Progress, Started
from multimodal_gen.server import replies
from multimodal_gen.server.context import Context
from multimodal_gen.server.errors import error_body
from multimodal_gen.server.event_stream import EventStream, never_silent
from multimodal_gen.server.replies import Form

if TYPE_CHECKING:
    from multimodal_gen.engine.ticket import Ticket
    from multimodal_gen.server.guard import Exchange

P = ParamSpec("P")


class ImageStream(EventStream):
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
        super().__init__(context, exchange, (ticket,), headers)
        self.ticket = ticket
        self.form = form
        self.maker = maker
        self.warnings = warnings

    def error_part(self, error: MmgenError) -> bytes:
        return replies.event_bytes("error", {"type": "error", **error_body(error)})

    async def parts(self) -> AsyncIterator[bytes]:
        request = self.ticket.request
        async for event in never_silent(aiter(self.ticket)):
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
