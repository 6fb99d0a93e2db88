"""The body of one request on its way in: bounded in bytes and in time, and drained when it is refused half-way."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive

from multimodal_gen.errors import Cancelled, RequestTimeout
from multimodal_gen.server.security import body_too_large

DISCARD_S = 2.0


class BoundedBody:
    """An ASGI `receive` that raises once the body is too large or too slow."""

    def __init__(
        self, receive: Receive, *, expected: bool, limit: int, timeout_s: float, bytes_per_second: float
    ) -> None:
        """`bytes_per_second`: every so many bytes that came give one second more than `timeout_s`."""
        self.complete = not expected
        self._receive = receive
        self._limit = limit  # bytes
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._rate = bytes_per_second
        self._seen = 0

    async def __call__(self) -> Message:
        """The next message. Raises: BodyTooLarge, RequestTimeout, Cancelled when the client leaves half-way."""
        if self.complete:
            return await self._receive()
        message = await self._next(self._deadline + self._seen / self._rate)
        if message is None:
            raise RequestTimeout(
                f"The body did not arrive within {self._timeout_s:g} s, which is --body-timeout-s on this server."
            )
        if message["type"] == "http.disconnect":
            raise Cancelled("The client went away.")
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            raise body_too_large(self._limit)
        return message

    async def discard(self) -> None:
        """Read and forget what the client still sends, for two seconds at most: closing a connection with unread
        data resets it, and the client would lose the answer that says what is wrong."""
        deadline = asyncio.get_running_loop().time() + DISCARD_S
        while not self.complete:
            if await self._next(deadline) is None:
                return

    async def _next(self, deadline: float) -> Message | None:
        left = deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.0))
        except asyncio.TimeoutError:
            return None
        self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message
