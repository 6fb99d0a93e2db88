"""The host allocator's habits, as far as they decide about speed."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
KEEP_BYTES = 1 << 30
OLD_MMAP_LIMIT = 32 << 20  # the largest mapping threshold that older glibc accepts


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks up to 1 GiB instead of returning them to the kernel; False on another libc.

    A forward on the CPU frees and allocates the same activations layer after layer. With the default thresholds most
    of them are unmapped and faulted in again, page by page: about a tenth of a step at 512 x 512, and several times the
    arithmetic of a single norm or gate (`benchmarks/host_allocator.py`). The process keeps its peak of activations in
    exchange.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    try:
        mallopt = libc.mallopt
    except AttributeError:  # musl
        return False
    mapped = mallopt(M_MMAP_THRESHOLD, KEEP_BYTES) or mallopt(M_MMAP_THRESHOLD, OLD_MMAP_LIMIT)
    return bool(mapped and mallopt(M_TRIM_THRESHOLD, KEEP_BYTES))


def share_freed_memory() -> bool:
    """Tell glibc to keep one heap for all threads that start from now on; False on another libc.

    By default a thread has a heap of its own, and what it has freed is of no use to another: with `keep_freed_memory`
    each would keep its own peak. That is 350 MB of a step at 1024 x 1024 on two cores, and 90 MB where reading threads
    merge adapters into streamed layers. Threads of a forward allocate little, and seldom at the same moment.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(M_ARENA_MAX, 1))


def release_freed_memory() -> None:
    """Give what is free inside glibc's heap back to the kernel, after something large was let go of."""
    if sys.platform != "linux":
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # musl
        return
    trim(0)
