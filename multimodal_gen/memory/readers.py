"""Threads that read weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor


class Readers:
    """Several threads that share the tensors of a layer among them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.threads = ThreadPoolExecutor(count, "weights", _single_threaded)

    def submit(self, read: Callable[[Sequence[str]], None], keys: Sequence[str]) -> list[Future[None]]:
        """Call `read` with shares of `keys`, each in the order of the file."""
        shares = [keys[index :: self.count] for index in range(self.count)]
        return [self.threads.submit(read, share) for share in shares if share]


def _single_threaded() -> None:
    """Two OpenMP teams on the same cores would fight; a reader's own work is copying, mostly."""
    try:
        set_threads = ctypes.CDLL(None).omp_set_num_threads
    except (AttributeError, OSError):  # torch was built with another runtime, or without
        return
    set_threads(1)
