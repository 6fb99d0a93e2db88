"""Uploaded adapters: written under a name of ours into `uploads/` of the first root, and removed once unloaded."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from multimodal_gen.adapters import AdapterInfo
from multimodal_gen.errors import CorruptAdapter, StorageFull

FOLDER = "uploads"

_OURS = re.compile(r"[0-9a-f]{32}\.safetensors")

log = logging.getLogger("multimodal_gen.server")


async def receive(chunks: AsyncIterator[bytes], root: Path) -> tuple[Path, int]:
    """Write a body to a new file; returns its path and its bytes.

    The file has its final name only once it is whole and on the disk. Raises: StorageFull; whatever the body raises.
    """
    folder = root / FOLDER
    path = folder / f"{uuid.uuid4().hex}.safetensors"
    temporary = path.with_suffix(".part")
    size = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            async for chunk in chunks:
                size += len(chunk)
                await asyncio.to_thread(file.write, chunk)
            if not size:
                raise CorruptAdapter("The body is empty; send the bytes of a safetensors file.")
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        temporary.rename(path)
    except OSError as error:
        log.error("an upload cannot be written: %s", error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageFull(f"The upload cannot be stored: {'the disk is full' if full else error.strerror}.") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return path.resolve(), size


def uploaded(loaded: Iterable[AdapterInfo], root: Path) -> list[Path]:
    """The files of loaded adapters that were uploaded."""
    folder = (root / FOLDER).resolve()
    paths = [Path(info.path) for info in loaded]
    # Only names of ours: an operator may keep files of their own there.
    return [path for path in paths if path.parent == folder and _OURS.fullmatch(path.name)]


def discard_unused(files: Iterable[Path], loaded: Iterable[AdapterInfo]) -> None:
    """Remove those of the uploaded `files` that no loaded adapter came from."""
    used = {info.path for info in loaded}
    for file in files:
        if str(file) not in used:
            file.unlink(missing_ok=True)
