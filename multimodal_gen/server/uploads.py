"""Uploaded adapters: written under a name of ours into `uploads/` of the first root, and removed once unloaded."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from multimodal_gen.adapters import AdapterInfo
from multimodal_gen.errors import CorruptAdapter, StorageFull
from multimodal_gen.lora.sources import CONFIG, FOLDER_FILES

FOLDER = "uploads"
STALE_S = 86_400

log = logging.getLogger("multimodal_gen.server")


class Uploads:
    """The files that this server has received; another server may use the same folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._received: set[str] = set()

    async def receive(self, chunks: AsyncIterator[bytes]) -> tuple[Path, int]:
        """Write a body to a new file; returns its path and its bytes. Raises as `_receive`."""
        path, size = await _receive(chunks, self.root)
        self._received.add(str(path))
        return path, size

    async def with_config(self, path: Path, config: bytes) -> None:
        """Put a received file into a folder of its own (`beside(path)`), beside an `adapter_config.json`.

        Raises: StorageFull.
        """
        self._received.add(str(beside(path)))
        try:
            await asyncio.to_thread(_move, path, beside(path), config)
        except OSError as error:
            raise _not_stored(error) from None

    def discard_unused(self, loaded: Iterable[AdapterInfo], arriving: Iterable[Path] = ()) -> None:
        """Remove the files that no loaded adapter came from, those in `arriving` excepted."""
        kept = {info.path for info in loaded} | {str(path) for path in arriving}
        for path in sorted(self._received - kept):
            _remove(Path(path))
            self._received.discard(path)


async def _receive(chunks: AsyncIterator[bytes], root: Path) -> tuple[Path, int]:
    """The file has its final name only once it is whole and on the disk.

    Raises: StorageFull; whatever the body raises.
    """
    folder = root / FOLDER
    path = folder / f"{uuid.uuid4().hex}.safetensors"
    temporary = path.with_suffix(".part")
    size = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
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
        raise _not_stored(error) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return path.resolve(), size


def _not_stored(error: OSError) -> StorageFull:
    log.error("an upload cannot be written: %s", error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StorageFull(f"The upload cannot be stored: {'the disk is full' if full else error.strerror}.")


def beside(path: Path) -> Path:
    """Where a received file goes that has a configuration."""
    return path.with_suffix("") / FOLDER_FILES[0]


def _move(path: Path, moved: Path, config: bytes) -> None:
    moved.parent.mkdir()
    (moved.parent / CONFIG).write_bytes(config)
    path.rename(moved)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    if path.parent.name != FOLDER:  # it has a folder of its own
        with contextlib.suppress(FileNotFoundError):
            (path.parent / CONFIG).unlink(missing_ok=True)
            path.parent.rmdir()


def _sweep(folder: Path) -> None:
    """Remove what servers left that were killed in the middle of an upload."""
    for part in folder.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):  # another server's, just finished
            if time.time() - part.stat().st_mtime > STALE_S:
                part.unlink()
