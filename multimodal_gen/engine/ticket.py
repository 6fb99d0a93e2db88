"""A request's claim on its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from multimodal_gen.errors import MmgenError
from multimodal_gen.messages import (
    Checkpoint,
    Finished,
    Frames,
    Generate,
    GenerateText,
    Preview,
    Progress,
    RowState,
    Started,
    TextDelta,
    TextFinished,
)
from multimodal_gen.request import AnyRequest
from multimodal_gen.text import TextRequest

if TYPE_CHECKING:
    from multimodal_gen.engine.replica import Replica

TicketEvent = Started | Progress | Checkpoint | Preview | Frames | Finished
TextTicketEvent = Started | TextDelta | TextFinished
AskedT = TypeVar("AskedT", AnyRequest, TextRequest)
ToldT = TypeVar("ToldT")


class Claim(Generic[AskedT, ToldT]):
    """What tickets of all kinds have: a stream of events that ends with the last one of its kind, or an error."""

    def __init__(self, request: AskedT, cancel: Callable[[str], None], arrived: float) -> None:
        self.request: AskedT = request
        self.arrived = arrived  # monotonic seconds
        self.replica: Replica | None = None  # set by the client while a group of workers has the request
        self.cancelled = False  # set by the replica; should the worker die before it obeys, nobody runs it again
        self.started = False  # set by the replica when the worker has taken it up
        self._cancel = cancel
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    @property
    def behind(self) -> int:
        """Events that nobody has read yet."""
        return self._events.qsize()

    def push(self, event: ToldT) -> None:
        """Called by the replica."""
        self._events.put_nowait(event)

    def end(self, answer: Finished | TextFinished | MmgenError) -> None:
        """Called by the client: the last word."""
        self._events.put_nowait(answer)

    def cancel(self) -> None:
        """Stop the request before its next step; the stream then raises Cancelled."""
        self._cancel(self.request.id)

    async def __aiter__(self) -> AsyncIterator[ToldT]:
        while True:
            event = await self._events.get()
            if isinstance(event, MmgenError):
                raise event
            yield event
            if isinstance(event, (Finished, TextFinished)):
                return


class Ticket(Claim[AnyRequest, TicketEvent]):
    """Of a picture or a video: what `EngineClient.submit` returns. Its stream ends with Finished."""

    def __init__(
        self, request: AnyRequest, cancel: Callable[[str], None], arrived: float, resume: list[RowState]
    ) -> None:
        super().__init__(request, cancel, arrived)
        self.resume = resume  # where its rows go on
        self.steps_done = 0  # counted by the replica: of all rows
        self._waits_for_the_end = False

    def push(self, event: TicketEvent) -> None:
        if not self._waits_for_the_end:
            super().push(event)

    @property
    def cost_left(self) -> float:
        """Token-steps still to be done."""
        request = self.request
        return max(0.0, request.cost - self.steps_done * request.row_tokens)

    def message(self, deadline_s: float | None) -> Generate:
        """What the worker is sent."""
        return Generate(msgspec.structs.replace(self.request, deadline_s=deadline_s), self.resume)

    async def result(self) -> Finished:
        """Wait for the end; nothing else is kept from now on. Raises: the request's error."""
        self._waits_for_the_end = True
        async for event in self:
            if isinstance(event, Finished):
                return event
        raise AssertionError("a ticket's stream ends with Finished or an error")


class TextTicket(Claim[TextRequest, TextTicketEvent]):
    """Of a text: what `EngineClient.submit_text` returns. Its stream ends with TextFinished.

    `llm.answers.Answers` puts the deltas together.
    """

    def __init__(self, request: TextRequest, cancel: Callable[[str], None], arrived: float) -> None:
        super().__init__(request, cancel, arrived)
        self.tokens_done = 0  # counted by the replica: of all choices

    @property
    def cost_left(self) -> float:
        """Tokens still to be read and written, at most."""
        read = len(self.request.prompt) if self.tokens_done else 0
        return max(0.0, self.request.cost - read - self.tokens_done)

    def message(self, deadline_s: float | None) -> GenerateText:
        """What the worker is sent."""
        return GenerateText(msgspec.structs.replace(self.request, deadline_s=deadline_s))


AnyTicket = Ticket | TextTicket
