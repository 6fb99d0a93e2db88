"""Stacks of what is stuck, on stderr: of this process while it starts, and of its event loop for as long as it runs.

The timer is `faulthandler`'s, a thread in C: it needs neither the interpreter's lock nor the event loop, so it also
fires when one of them is what hangs. It only tells. What the front waits for may be a slow disk or a large download,
and a server that ends itself in the middle of one would never start. Workers, which can be replaced, are killed
(`engine/group.py`). There is one such timer in a process; whoever arms it disarms it, whatever happens.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2
LOOP_SECONDS = 20.0
TICK_SECONDS = 2.0

log = logging.getLogger(__name__)


@contextmanager
def stacks_after(seconds: float) -> Iterator[None]:
    """Write the stacks of all threads every so many seconds until the block has been left."""
    faulthandler.dump_traceback_later(seconds, repeat=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


async def watch_loop(limit_s: float = LOOP_SECONDS, tick_s: float = TICK_SECONDS) -> None:
    """Until cancelled: write the stacks of all threads while the running event loop has been held up for `limit_s`."""
    while True:
        with stacks_after(limit_s):
            begin = time.monotonic()
            await asyncio.sleep(tick_s)
            late = time.monotonic() - begin - tick_s
        if late > limit_s:
            log.error("the event loop was held up for %.0f s; the stacks are above", late)
