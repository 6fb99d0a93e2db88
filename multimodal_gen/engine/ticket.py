"""A request's claim on its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from multimodal_gen.errors import MmgenError
from multimodal_gen.messages import Checkpoint, Finished, Preview, Progress, RowState, Started
from multimodal_gen.request import AnyRequest

if TYPE_CHECKING:
    from multimodal_gen.engine.replica import Replica

TicketEvent = Started | Progress | Checkpoint | Preview | Finished


class Ticket:
    """What `EngineClient.submit` returns: an asynchronous stream of events that ends with Finished or an error."""

    def __init__(
        self, request: AnyRequest, cancel: Callable[[str], None], arrived: float, resume: list[RowState]
    ) -> None:
        self.request = request
        self.resume = resume  # where its rows go on
        self.arrived = arrived  # monotonic seconds
        self.replica: Replica | None = None  # set by the client while a group of workers has the request
        self.cancelled = False  # set by the replica; should the worker die before it obeys, nobody runs it again
        self.started = False  # set by the replica when the worker has taken the first row
        self.steps_done = 0  # counted by the replica: of all rows
        self._cancel = cancel
        self._events: asyncio.Queue[TicketEvent | MmgenError] = asyncio.Queue()

    @property
    def cost_left(self) -> float:
        """Token-steps still to be done."""
        request = self.request
        return max(0.0, request.cost - self.steps_done * request.row_tokens)

    def push(self, event: TicketEvent | MmgenError) -> None:
        """Called by the client."""
        self._events.put_nowait(event)

    def cancel(self) -> None:
        """Stop the request before its next step; the stream then raises Cancelled."""
        self._cancel(self.request.id)

    async def __aiter__(self) -> AsyncIterator[TicketEvent]:
        while True:
            event = await self._events.get()
            if isinstance(event, MmgenError):
                raise event
            yield event
            if isinstance(event, Finished):
                return

    async def result(self) -> Finished:
        """Wait for the end. Raises: the request's error."""
        async for event in self:
            if isinstance(event, Finished):
                return event
        raise AssertionError("a ticket's stream ends with Finished or an error")
