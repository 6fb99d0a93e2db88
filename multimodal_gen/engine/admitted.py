"""The requests that a client of the engine has admitted and not yet answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from multimodal_gen.engine.ticket import AnyTicket, TextTicket, Ticket
from multimodal_gen.errors import MmgenError
from multimodal_gen.messages import Finished, TextFinished
from multimodal_gen.text import TextRequest


class Admitted:
    """Tickets by request id, and what they come to; pictures and texts are counted apart."""

    def __init__(self) -> None:
        self._tickets: dict[str, AnyTicket] = {}
        self.none_left = asyncio.Event()
        self.none_left.set()
        self.on_text: Callable[[TextRequest, TextFinished], None] | None = None  # set by whoever wants to know

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[AnyTicket]:
        return iter(list(self._tickets.values()))

    def get(self, request_id: str) -> AnyTicket | None:
        """The ticket of a request."""
        return self._tickets.get(request_id)

    def add(self, ticket: AnyTicket) -> None:
        """One more."""
        self._tickets[ticket.request.id] = ticket
        self.none_left.clear()

    def answered(self, ticket: AnyTicket, answer: Finished | TextFinished | MmgenError) -> None:
        """A ticket's last word."""
        del self._tickets[ticket.request.id]
        if not self._tickets:
            self.none_left.set()
        ticket.replica = None
        ticket.end(answer)
        if self.on_text is not None and isinstance(ticket, TextTicket) and isinstance(answer, TextFinished):
            self.on_text(ticket.request, answer)

    @property
    def pictures(self) -> list[Ticket]:
        """Of pictures and videos."""
        return [ticket for ticket in self._tickets.values() if isinstance(ticket, Ticket)]

    @property
    def texts(self) -> list[TextTicket]:
        """Of texts."""
        return [ticket for ticket in self._tickets.values() if isinstance(ticket, TextTicket)]

    @property
    def pictures_cost(self) -> int:
        """Token-steps of all requests for pictures."""
        return sum(ticket.request.cost for ticket in self.pictures)

    @property
    def pictures_waiting(self) -> int:
        """Requests for pictures that have not started."""
        return sum(not ticket.started for ticket in self.pictures)

    @property
    def pictures_running(self) -> int:
        """Requests for pictures that have."""
        return sum(ticket.started for ticket in self.pictures)

    def users(self, digest: str) -> int:
        """Requests for texts that use an adapter of the language model."""
        return sum(ticket.request.adapter == digest for ticket in self.texts)

    @property
    def texts_waiting(self) -> int:
        """Requests for texts that have not started."""
        return sum(not ticket.started for ticket in self.texts)

    @property
    def texts_running(self) -> int:
        """Requests for texts that have."""
        return sum(ticket.started for ticket in self.texts)
