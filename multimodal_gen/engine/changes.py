"""Changes of adapters beside the denoising loop: staged in a thread, one after another, committed between steps."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from multimodal_gen.adapters import Change
from multimodal_gen.engine.faults import Fault
from multimodal_gen.errors import GenerationFailed, MmgenError, OutOfMemory
from multimodal_gen.lora.changes import Staged
from multimodal_gen.lora.manager import LoraManager
from multimodal_gen.memory.failures import is_out_of_memory
from multimodal_gen.messages import ErrorInfo, LorasChanged, LorasRefused

log = logging.getLogger(__name__)


@dataclass
class _Running:
    """The change that is being staged."""

    id: str
    began: float  # monotonic seconds
    staged: Future[Staged]


class Changes:
    """The queue of changes of one engine. All methods belong to the engine's thread."""

    def __init__(self, manager: LoraManager, fault: Fault, on_change: Callable[[], None]) -> None:
        """`on_change` is called once other adapters than before are active."""
        self.manager = manager
        self._on_change = on_change
        self.on_staged: Callable[[], None] = lambda: None  # called in the thread; wakes a sleeping engine
        self._fault = fault
        self._waiting: deque[tuple[str, Change]] = deque()
        self._running: _Running | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    @property
    def pending(self) -> bool:
        """Whether a change is not committed yet."""
        return self._running is not None

    def begin(self, change_id: str, change: Change) -> None:
        """Queue a change."""
        self._waiting.append((change_id, change))
        self._next()

    def finish(self, *, weights_too: bool) -> list[LorasChanged | LorasRefused]:
        """Commit what has been staged; returns at once when nothing has."""
        answers: list[LorasChanged | LorasRefused] = []
        while self._running is not None and self._running.staged.done():
            running, self._running = self._running, None
            answers.append(self._commit(running, weights_too))
            self._next()
        return answers

    def run(self, change: Change, *, weights_too: bool) -> LorasChanged:
        """One change from beginning to end, in this thread. Raises: the change's error."""
        assert not self.pending, "a synchronous engine has one change at a time"
        began = time.monotonic()
        changed = self._finished(self._stage(change), weights_too)
        return LorasChanged("", self.manager.state, changed, time.monotonic() - began)

    def _next(self) -> None:
        if self._running is None and self._waiting:
            change_id, change = self._waiting.popleft()
            staged = self._thread.submit(self._stage, change)
            self._running = _Running(change_id, time.monotonic(), staged)
            staged.add_done_callback(lambda _: self.on_staged())

    def _stage(self, change: Change) -> Staged:
        self._fault.trip("adapter")
        return self.manager.stage(change)

    def _commit(self, running: _Running, weights_too: bool) -> LorasChanged | LorasRefused:
        try:
            changed = self._finished(running.staged.result(), weights_too)
        except MmgenError as error:
            return LorasRefused(running.id, ErrorInfo(error.code, error.message, error.param))
        except Exception as error:  # told to the one who asked; the log has the rest
            log.exception("the change of adapters %s failed", running.id)
            told = as_change_error(error)
            return LorasRefused(running.id, ErrorInfo(told.code, told.message))
        return LorasChanged(running.id, self.manager.state, changed, time.monotonic() - running.began)

    def _finished(self, staged: Staged, weights_too: bool) -> bool:
        active = self.manager.state.active
        self.manager.commit(staged, weights_too=weights_too)
        if self.manager.state.active != active:
            self._on_change()
        return staged.changed


def as_change_error(error: Exception) -> MmgenError:
    """What the one who asked for a change is told of an unexpected failure."""
    if is_out_of_memory(error):
        return OutOfMemory("There was not enough memory for this change of adapters; the set before is still active.")
    return GenerationFailed(
        f"The change of adapters failed ({type(error).__name__}) and the set before is still active; the log has more."
    )
