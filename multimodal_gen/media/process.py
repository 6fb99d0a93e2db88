"""Media work in a process of its own, as an asyncio program sees it.

One helper for each order, killed when it takes too long or when nobody waits for it any more. How long a video takes to
be made is not held against its encoder, only how long others wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import time
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from multimodal_gen.environment import worker_environment
from multimodal_gen.errors import GenerationFailed, InvalidImage, from_code
from multimodal_gen.media.orders import HEADER, Done, Order, ReadPicture, WriteVideo, pack, read_answer

PACKAGE = Path(__file__).resolve().parent.parent
# This very package, and nothing from the current folder: see engine/process.py.
LAUNCH = """
import sys
sys.path = [sys.argv[1], *filter(None, sys.path)]
import multimodal_gen
sys.path.pop(0)
from multimodal_gen.media.helper import main
sys.exit(main())
"""
CHUNK = 1 << 20
MAX_ANSWER_BYTES = 1 << 16
PICTURE_S = 20.0
# An encoder that makes less than this of raw pixels is stuck.
VIDEO_S, VIDEO_BYTES_PER_S = 60.0, 1 << 19

Answered = TypeVar("Answered")

log = logging.getLogger(__name__)


class HelperDied(Exception):
    """The helper ended without an answer, or was killed for being slow."""


async def read_picture(data: bytes, max_bytes: int) -> bytes:
    """`media.reference.read_reference` at arm's length. Raises: the InvalidImage family."""
    try:
        return await _run(ReadPicture(len(data), max_bytes), [memoryview(data)], PICTURE_S)
    except HelperDied as error:
        log.warning("a picture of %d bytes was not read: %s", len(data), error)
        raise InvalidImage("The picture takes too much time or memory to read; send a simpler one.") from None


class VideoWriter:
    """A helper that writes the files of one video, whose frames come one after another.

    Whoever calls `start` calls `close`, whatever happens in between. Without `finish` there are no files.
    """

    def __init__(self, order: WriteVideo) -> None:
        self.order = order
        self.seconds = 0.0  # that others have waited for it
        self._written = 0  # bytes
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Raises: StorageFull, GenerationFailed."""
        self._process = await _start()
        await self._send(memoryview(pack(self.order)))

    async def write(self, frames: memoryview) -> None:
        """The bytes of the next frames, as many as there are. Raises: StorageFull, GenerationFailed."""
        self._written += frames.nbytes
        await self._send(frames)

    async def finish(self) -> None:
        """All frames are written: wait for the files. Raises: StorageFull, GenerationFailed."""
        assert self._process is not None, "started before"
        assert self._written == math.prod(self.order.shape), (self._written, self.order.shape)
        # Encoders look ahead: much of the work may be left.
        await self._timed(_answer(self._process), self._written)

    async def close(self) -> None:
        """End the helper, wherever it is."""
        if self._process is not None:
            await _end(self._process)

    async def _send(self, part: memoryview) -> None:
        assert self._process is not None, "started before"
        if not await self._timed(_send(self._process, [part]), part.nbytes):
            await self._timed(_answer(self._process), 0)  # it has said why it reads no more
            raise AssertionError("a helper answers before the last frame only to refuse")

    async def _timed(self, work: Coroutine[Any, Any, Answered], nbytes: int) -> Answered:
        limit, began = VIDEO_S + nbytes / VIDEO_BYTES_PER_S, time.monotonic()
        try:
            return await asyncio.wait_for(work, limit)
        except (HelperDied, asyncio.TimeoutError) as error:
            log.error("a video was not encoded: %s", str(error) or f"the encoder was stuck for {limit:.0f} s")
            raise GenerationFailed("The video could not be encoded: the encoder died or took too long.") from None
        finally:
            self.seconds += time.monotonic() - began


async def write_video(order: WriteVideo, frames: memoryview) -> None:
    """Write the files of one video whose frames are all there. Raises: StorageFull, GenerationFailed."""
    writer = VideoWriter(order)
    try:
        await writer.start()
        await writer.write(frames)
        await writer.finish()
    finally:
        await writer.close()


async def _run(order: Order, payload: Sequence[memoryview], limit_s: float) -> bytes:
    process = await _start()

    async def talk() -> bytes:
        await _send(process, [memoryview(pack(order)), *payload])
        return await _answer(process)

    try:
        return await asyncio.wait_for(talk(), limit_s)
    except asyncio.TimeoutError:
        raise HelperDied(f"it had not answered after {limit_s:.0f} s") from None
    finally:
        await _end(process)


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", LAUNCH, str(PACKAGE.parent),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=worker_environment(),
    )  # fmt: skip


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _send(process: asyncio.subprocess.Process, payload: Iterable[memoryview]) -> bool:
    """Whether all was taken: a helper that refuses early closes its end, and what it says matters then."""
    assert process.stdin is not None, "the process was started with a pipe"
    try:
        for part in payload:
            for start in range(0, part.nbytes, CHUNK):
                process.stdin.write(part[start : start + CHUNK])
                await process.stdin.drain()
    except ConnectionError:
        return False
    return True


async def _answer(process: asyncio.subprocess.Process) -> bytes:
    """Raises: HelperDied, what the helper raised."""
    assert process.stdin is not None, "the process was started with a pipe"
    assert process.stdout is not None, "the process was started with a pipe"
    process.stdin.close()
    try:
        (length,) = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
        if length > MAX_ANSWER_BYTES:
            raise HelperDied(f"it announced an answer of {length} bytes")
        answer = read_answer(await process.stdout.readexactly(length))
        if isinstance(answer, Done):
            return await process.stdout.readexactly(answer.bytes)
    except (asyncio.IncompleteReadError, msgspec.DecodeError) as error:
        code = await process.wait()
        raise HelperDied(f"it ended with exit code {code} ({type(error).__name__})") from None
    raise from_code(answer.error.code, answer.error.message, answer.error.param)
