"""Answers that are told as they are written, in OpenAI's chunks: `data: {…}` for each, `data: [DONE]` at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from multimodal_gen.errors import MmgenError
from multimodal_gen.messages import TextDelta, TextFinished
from multimodal_gen.server.completion_replies import CompletionForm, completion_logprobs, total_usage
from multimodal_gen.server.context import Context
from multimodal_gen.server.errors import error_body
from multimodal_gen.server.event_stream import EventStream, never_silent
from multimodal_gen.server.replies import comment_bytes
from multimodal_gen.server.text_replies import (
    DONE,
    ChatForm,
    Told,
    chat_logprobs,
    data_bytes,
    finish_reason,
    spoken,
    usage_view,
)
from multimodal_gen.text import TextUsage

if TYPE_CHECKING:
    from multimodal_gen.engine.ticket import TextTicket, TextTicketEvent
    from multimodal_gen.server.guard import Exchange


class ChatStream(EventStream):
    """The chunks of a chat: per choice first its role, then what is new, last why it ended."""

    def __init__(
        self, context: Context, exchange: Exchange, ticket: TextTicket, form: ChatForm, headers: dict[str, str]
    ) -> None:
        super().__init__(context, exchange, (ticket,), headers)
        self.ticket = ticket
        self.form = form
        self.choices = [_ChatChoice(index, form) for index in range(ticket.request.n)]

    def error_part(self, error: MmgenError) -> bytes:
        return data_bytes(error_body(error))

    async def parts(self) -> AsyncIterator[bytes]:
        async for event in never_silent(aiter(self.ticket)):
            if event is None:
                yield comment_bytes("waiting")
            elif isinstance(event, TextDelta):
                for choice in self.choices[event.index].chunks(event):
                    yield self._chunk([choice])
            elif isinstance(event, TextFinished):
                if self.form.usage_chunk:
                    yield self._chunk([], usage=usage_view(event.usage))
                yield DONE

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk = {**self.form.heading.of("chat.completion.chunk"), "choices": choices}
        if self.form.usage_chunk:
            chunk["usage"] = usage
        if self.form.warnings and not choices:
            chunk["warnings"] = list(self.form.warnings)
        return data_bytes(chunk)


class _ChatChoice:
    """One answer of a stream."""

    def __init__(self, index: int, form: ChatForm) -> None:
        self.index = index
        self.form = form
        self.parser = form.parser()
        self.told = Told()
        self.logprobs: list[dict[str, Any]] = []  # not yet told: their text was held back
        self.begun = False

    def chunks(self, delta: TextDelta) -> list[dict[str, Any]]:
        """What the client is told of a step; nothing while the parsers cannot know what the text is."""
        chunks = [] if self.begun else [self._choice({"role": "assistant", "content": ""})]
        self.begun = True
        self.told.add(self.parser.feed(delta.text))
        if self.form.logprobs:
            own = spoken(delta.logprobs, delta.finish, delta.stop_reason, self.form.tokenizer)
            self.logprobs += chat_logprobs(own, self.form.tokenizer)
        if delta.finish is not None:
            self.told.add(self.parser.finish())
        fields = self.told.delta()
        if fields or (self.logprobs and delta.finish is not None):
            chunks.append(self._choice(fields, self._taken_logprobs()))
        if delta.finish is not None:
            end = self._choice({}, None, finish_reason(delta.finish, self.parser.calls))
            chunks.append(end if delta.stop_reason is None else {**end, "stop_reason": delta.stop_reason})
        return chunks

    def _choice(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _taken_logprobs(self) -> dict[str, Any] | None:
        if not self.form.logprobs:
            return None
        told, self.logprobs = self.logprobs, []
        return {"content": told}


class CompletionStream(EventStream):
    """The chunks of completions: of all prompts, mixed as they come."""

    def __init__(
        self,
        context: Context,
        exchange: Exchange,
        tickets: Sequence[TextTicket],
        form: CompletionForm,
        headers: dict[str, str],
    ) -> None:
        super().__init__(context, exchange, tickets, headers)
        self.texts = tickets
        self.form = form
        self.offsets: dict[int, int] = {}  # by choice: characters told so far

    def error_part(self, error: MmgenError) -> bytes:
        return data_bytes(error_body(error))

    async def parts(self) -> AsyncIterator[bytes]:
        usages: list[TextUsage] = []
        async for told in never_silent(_merged(self.texts)):
            if told is None:
                yield comment_bytes("waiting")
                continue
            prompt, event = told
            if isinstance(event, TextDelta):
                yield self._chunk([self._choice(prompt, event)])
            elif isinstance(event, TextFinished):
                usages.append(event.usage)
        if self.form.usage_chunk:
            yield self._chunk([], usage_view(total_usage(usages, self.form)))
        yield DONE

    def _choice(self, prompt: int, delta: TextDelta) -> dict[str, Any]:
        index = self.form.index(prompt, delta.index)
        echo = self.form.echo(prompt) if index not in self.offsets else ""
        offset = self.offsets.get(index, 0) + len(echo)
        text = delta.text if self.form.written else ""
        self.offsets[index] = offset + len(text)
        choice: dict[str, Any] = {"index": index, "text": echo + text, "logprobs": None, "finish_reason": delta.finish}
        if self.form.logprobs:
            own = spoken(delta.logprobs, delta.finish, delta.stop_reason, self.form.tokenizer)
            choice["logprobs"] = completion_logprobs(own, self.form.tokenizer, offset)
        if delta.stop_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        return choice

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk = {**self.form.heading.of("text_completion"), "choices": choices}
        if self.form.usage_chunk:
            chunk["usage"] = usage
        return data_bytes(chunk)


async def _merged(tickets: Sequence[TextTicket]) -> AsyncIterator[tuple[int, TextTicketEvent]]:
    """The events of several requests as they come, with the number of the request. Raises: the first error of any."""
    # A short queue: what a slow client does not take must pile up in the tickets, where it is counted.
    events: asyncio.Queue[tuple[int, TextTicketEvent | MmgenError]] = asyncio.Queue(16)

    async def pump(at: int, ticket: TextTicket) -> None:
        try:
            async for event in ticket:
                await events.put((at, event))
        except MmgenError as error:
            await events.put((at, error))

    pumps = [asyncio.create_task(pump(at, ticket)) for at, ticket in enumerate(tickets)]
    try:
        left = len(tickets)
        while left:
            at, event = await events.get()
            if isinstance(event, MmgenError):
                raise event
            left -= isinstance(event, TextFinished)
            yield at, event
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
