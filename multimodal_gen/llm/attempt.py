"""Work that may fail, for a core that is alone; the engine's own way has all ranks agree on the outcome."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Protocol

from multimodal_gen.errors import GenerationFailed, MmgenError, OutOfMemory, PeerLost
from multimodal_gen.memory.failures import is_out_of_memory

log = logging.getLogger(__name__)


class Attempt(Protocol):
    """Runs work and returns what it came to on all ranks: an error, or None. Only `PeerLost` is raised."""

    def __call__(self, what: str, work: Callable[[], None], *, lockstep: bool = False) -> MmgenError | None:
        """`lockstep`: ranks wait for one another inside the work."""


def attempt_alone(what: str, work: Callable[[], None], *, lockstep: bool = False) -> MmgenError | None:
    """One rank's attempt."""
    try:
        work()
    except PeerLost:
        raise
    except Exception as error:  # every kind of failure has the same answer: an end that is told
        log.error("%s failed", what, exc_info=error)
        traceback.clear_frames(error.__traceback__)
        return as_ours(error)
    return None


def as_ours(error: Exception) -> MmgenError:
    """The error that a text ends with when its work raised `error`."""
    if isinstance(error, MmgenError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("The device ran out of memory. Ask for fewer tokens or fewer choices.")
    return GenerationFailed(f"The model failed on this request ({type(error).__name__}); the server's log has more.")
