"""A file as an answer, whole or one range of it. Many ranges at once are refused: they cost more than
they are worth."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from multimodal_gen.errors import InvalidRange

CHUNK = 256 * 1024
_RANGE = re.compile(r"bytes=(?:([0-9]{1,15})-([0-9]{0,15})|-([0-9]{1,15}))")


def parse_range(text: str, size: int) -> tuple[int, int]:
    """First byte and the one after the last, of a file of `size` bytes.

    Raises: InvalidRange for text that is not one range of bytes, and for a range that the file does not have.
    """
    match = _RANGE.fullmatch(text.strip()) if len(text) < 64 else None
    if match is None:
        raise InvalidRange(
            f"The header Range must name one range of bytes, such as 'bytes=0-1023', got {text[:40]!a}.", param="Range"
        )
    if match[3] is not None:
        start, end = max(size - int(match[3]), 0), size
    else:
        start, end = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
    if not start < end:
        raise InvalidRange(f"The file has {size:,} bytes, none of them in the range {text[:40]!a}.", param="Range")
    return start, end


class FileAnswer(Response):
    """Sends a file that is open already, so that its removal meanwhile does no harm."""

    def __init__(self, descriptor: int, start: int, end: int, status: int, headers: dict[str, str]) -> None:
        super().__init__(status_code=status, headers={**headers, "content-length": str(end - start)})
        self._descriptor = descriptor
        self._start, self._end = start, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the bytes in chunks."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            place = self._start
            while place < self._end:
                wanted = min(CHUNK, self._end - place)
                data = await asyncio.to_thread(os.pread, self._descriptor, wanted, place)
                assert data, "a published file never shrinks"
                place += len(data)
                await send({"type": "http.response.body", "body": data, "more_body": place < self._end})
        finally:
            os.close(self._descriptor)


async def file_answer(request: Request, path: Path, media_type: str, etag: str) -> Response:
    """The answer to a GET for a file that never changes.

    Raises: FileNotFoundError; InvalidRange, whose header Content-Range the caller adds.
    """
    descriptor = await asyncio.to_thread(os.open, path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        headers = {"content-type": media_type, "accept-ranges": "bytes", "etag": etag}
        if etag in [tag.strip() for tag in request.headers.get("if-none-match", "")[:1024].split(",")]:
            os.close(descriptor)
            return Response(status_code=304, headers=headers)
        wanted = request.headers.get("range")
        if wanted is None or request.headers.get("if-range", etag) != etag:
            return FileAnswer(descriptor, 0, size, 200, headers)
        start, end = parse_range(wanted, size)
    except InvalidRange as error:
        os.close(descriptor)
        error.size = size
        raise
    return FileAnswer(descriptor, start, end, 206, {**headers, "content-range": f"bytes {start}-{end - 1}/{size}"})
