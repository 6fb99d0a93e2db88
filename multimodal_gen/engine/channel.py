"""Frames over a Unix socket pair: eight bytes of length, then one msgpack message.

The pair has no name in the file system, so no other user can reach it; its end closes with the process, so a death is
seen at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct

from multimodal_gen.messages import MAX_FRAME_BYTES, ToWorker, decode_to_worker, encode

HEADER = struct.Struct("<Q")
CHUNK = 1 << 20


class ChannelClosed(ConnectionError):
    """The other process is gone."""


def pack(message: object) -> bytes:
    """One message as a frame."""
    payload = encode(message)
    assert len(payload) <= MAX_FRAME_BYTES, f"a message of {len(payload)} bytes is over the frame limit"
    return HEADER.pack(len(payload)) + payload


def _length(header: bytes | bytearray) -> int:
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ChannelClosed(f"a frame of {length} bytes was announced; the limit is {MAX_FRAME_BYTES}")
    return int(length)


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame's payload. Raises: ChannelClosed."""
    try:
        return await reader.readexactly(_length(await reader.readexactly(HEADER.size)))
    except (asyncio.IncompleteReadError, ConnectionError):
        raise ChannelClosed("the worker closed its channel") from None


class WorkerChannel:
    """The worker's end: blocking sends, and receives that can look without waiting."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._poll.register(self._woken, select.POLLIN)
        self._buffer = bytearray()
        self._held = bytearray()

    def send(self, message: object, *, hold: bool = False) -> None:
        """`hold`: together with the next one, or at `flush`: the other side wakes up once. Raises: ChannelClosed."""
        self._held += pack(message)
        if not hold:
            self.flush()

    def flush(self) -> None:
        """Send what is held. Raises: ChannelClosed."""
        frames, self._held = self._held, bytearray()
        try:
            self._socket.sendall(frames)
        except ConnectionError:
            raise ChannelClosed("the front closed its channel") from None

    def wake(self) -> None:
        """End a wait of `receive`; from any thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full: whoever reads it wakes up anyway
            os.write(self._waker, b"\0")

    def receive(self, *, wait: bool, timeout_s: float | None = None) -> list[ToWorker]:
        """All messages that are there; with `wait`, at least one, or none after `wake` or `timeout_s`.

        Raises: ChannelClosed.
        """
        messages = self._complete()
        woken = False
        milliseconds = None if timeout_s is None else 1000 * timeout_s
        while True:
            ready = {
                number for number, _ in self._poll.poll(milliseconds if wait and not messages and not woken else 0)
            }
            woken |= not ready and timeout_s is not None
            if self._woken in ready:
                woken |= bool(os.read(self._woken, CHUNK))
            if self._socket.fileno() not in ready:
                if messages or woken or not wait:
                    return messages
                continue
            data = self._socket.recv(CHUNK)
            if not data:
                raise ChannelClosed("the front closed its channel")
            self._buffer += data
            messages += self._complete()

    def _complete(self) -> list[ToWorker]:
        messages = []
        while len(self._buffer) >= HEADER.size:
            end = HEADER.size + _length(self._buffer[: HEADER.size])
            if len(self._buffer) < end:
                break
            messages.append(decode_to_worker(bytes(self._buffer[HEADER.size : end])))
            del self._buffer[:end]
        return messages
