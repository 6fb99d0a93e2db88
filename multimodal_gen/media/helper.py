"""A helper process: it carries out one order from its standard input, answers on its standard output and ends.

Decoders and encoders are large programs in C that read what strangers sent. Here they can crash, eat memory or run for
ever without harm to the server, which kills this process when it has waited long enough, and by its own death.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from multimodal_gen.errors import GenerationFailed, MmgenError, StorageFull
from multimodal_gen.media.orders import HEADER, Answer, Done, Order, ReadPicture, Refused, WriteVideo, pack, read_order
from multimodal_gen.messages import ErrorInfo

PR_SET_PDEATHSIG = 1
# Address space for the largest picture that is read, many times over.
PICTURE_MEMORY = 3 << 30
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)


def main() -> int:
    """Serve one order; returns the exit code."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level="WARNING", format="%(asctime)s helper %(levelname)s %(name)s: %(message)s")
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    (length,) = HEADER.unpack(_exactly(source, HEADER.size))
    answer, payload = _carry_out(read_order(_exactly(source, length)), source)
    sink.write(pack(answer))
    sink.write(payload)
    sink.flush()
    return 0


def _carry_out(order: Order, source: BinaryIO) -> tuple[Answer, bytes]:
    try:
        if isinstance(order, ReadPicture):
            _limit_memory()
            from multimodal_gen.media.reference import read_reference

            png = read_reference(_exactly(source, order.bytes), order.max_bytes)
            return Done(len(png)), png
        _write(order, source)
    except MmgenError as error:
        return Refused(ErrorInfo(error.code, error.message, error.param)), b""
    except Exception as error:
        log.exception("the order failed")
        told = as_ours(error)
        return Refused(ErrorInfo(told.code, told.message)), b""
    return Done(), b""


def as_ours(error: Exception) -> MmgenError:
    """What the one who waits for files is told of an unexpected failure."""
    if isinstance(error, OSError) and error.errno in FULL:
        return StorageFull("The video's files cannot be stored: the server's disk is full.")
    if isinstance(error, OSError):
        return StorageFull(f"The video's files cannot be stored: {error.strerror or type(error).__name__}.")
    return GenerationFailed(f"The video could not be encoded ({type(error).__name__}); the server's log has more.")


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (PICTURE_MEMORY, PICTURE_MEMORY))


def _write(order: WriteVideo, source: BinaryIO) -> None:
    from multimodal_gen.media.recipe import Recipe
    from multimodal_gen.media.video import Frame, sheet_indices, spritesheet, thumbnail, write_video

    count, height, width, _ = order.shape
    sheet, middle = sheet_indices(count), count // 2
    kept: dict[int, Frame] = {}

    def frames() -> Iterator[Frame]:
        import numpy as np

        for i in range(count):
            frame = np.frombuffer(_exactly(source, height * width * 3), np.uint8).reshape(height, width, 3)
            if i == middle or i in sheet:
                kept[i] = frame
            yield frame

    recipe = Recipe.from_json(order.recipe)
    _publish(
        Path(order.video),
        lambda path: write_video(
            path, frames(), width=width, height=height, fps=order.fps, output_format=order.output_format, recipe=recipe
        ),
    )
    _publish(Path(order.thumbnail), lambda path: _put(path, thumbnail(kept[middle])))
    _publish(Path(order.spritesheet), lambda path: _put(path, spritesheet([kept[i] for i in sheet])))
    folder = os.open(Path(order.video).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _publish(path: Path, write: Callable[[Path], None]) -> None:
    """The file has its name only once it is whole and on the disk. Until then it has one that no other helper uses: one
    may be left of a server that was just killed."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _exactly(source: BinaryIO, size: int) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise EOFError("the server went away")
    return data
