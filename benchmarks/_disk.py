"""The disk under a file: its pages out of the cache, and how fast it can be read."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

BLOCK_BYTES = 8 << 20


def drop_cache(folder: Path) -> None:
    """Take the files of a folder out of the page cache; the rest of the machine's cache stays."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def bandwidth(path: Path) -> float:
    """Bytes per second of reading a file from its disk in order, 8 MiB at a time, around the page cache."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        block, done = mmap.mmap(-1, BLOCK_BYTES), 0  # page-aligned, as O_DIRECT wants it
        begin = time.perf_counter()
        while count := os.preadv(file, [block], done):
            done += count
            if count < BLOCK_BYTES:
                break
        return done / (time.perf_counter() - begin)
    finally:
        os.close(file)
