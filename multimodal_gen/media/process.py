"""Media work in a process of its own, as an asyncio program sees it.

One helper for each order, killed when it takes too long or when nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

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


async def write_video(order: WriteVideo, frames: memoryview) -> None:
    """Write the files of one video. Raises: StorageFull, GenerationFailed."""
    try:
        await _run(order, [frames], VIDEO_S + frames.nbytes / VIDEO_BYTES_PER_S)
    except HelperDied as error:
        log.error("a video was not encoded: %s", error)
        raise GenerationFailed("The video could not be encoded: the encoder died or took too long.") from None


async def _run(order: Order, payload: Iterable[memoryview], limit_s: float) -> bytes:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LAUNCH, str(PACKAGE.parent),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=worker_environment(),
    )  # fmt: skip
    try:
        return await asyncio.wait_for(_talk(process, order, payload), limit_s)
    except asyncio.TimeoutError:
        raise HelperDied(f"it had not answered after {limit_s:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _talk(process: asyncio.subprocess.Process, order: Order, payload: Iterable[memoryview]) -> bytes:
    assert process.stdin is not None, "the process was started with a pipe"
    assert process.stdout is not None, "the process was started with a pipe"
    # A helper that refuses early closes its end; what it says matters then, not what it did not read.
    with contextlib.suppress(ConnectionError):
        process.stdin.write(pack(order))
        for part in payload:
            for start in range(0, part.nbytes, CHUNK):
                process.stdin.write(part[start : start + CHUNK])
                await process.stdin.drain()
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
