"""Changes of adapters beside the steps of a model: staged in a thread, one after another, committed between steps.

With several ranks, each stages the same change. It is committed in the turn in which all are found to have staged it,
and refused everywhere when one could not.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from multimodal_gen.adapters import Change, LoraState, Side
from multimodal_gen.engine.failures import info_of
from multimodal_gen.engine.faults import Fault
from multimodal_gen.engine.ranks import Ranks
from multimodal_gen.errors import AdapterError, GenerationFailed, MmgenError, OutOfMemory, PeerLost, from_code
from multimodal_gen.lora.changes import Staged
from multimodal_gen.memory.failures import is_out_of_memory
from multimodal_gen.messages import LorasChanged, LorasRefused, Staging, decode_staging, encode

log = logging.getLogger(__name__)


class Stage(Protocol):
    """The state before a change, in which it is worked out."""

    def stage(self, change: Change) -> Staged:
        """In any thread, altering nothing. Raises: the AdapterError family."""


class Adapters(Protocol):
    """Those of one model: `LoraManager` of pictures, `TextAdapters` of text."""

    @property
    def state(self) -> LoraState:
        """What is loaded, and what requests get."""

    def stager(self) -> Stage:
        """From the state of now."""

    def commit(self, staged: Staged, *, weights_too: bool) -> None:
        """Make it so, between two steps. Raises: what merging raised; nothing has changed then."""


@dataclass
class _Running:
    """The change that is being staged."""

    id: str
    began: float  # monotonic seconds
    staged: Future[Staged]


class Changes:
    """The queue of changes of one engine. All methods belong to the engine's thread."""

    def __init__(
        self,
        manager: Adapters,
        fault: Fault,
        ranks: Ranks,
        on_change: Callable[[], None] = lambda: None,
        side: Side = "pictures",
    ) -> None:
        """`on_change` is called once other adapters than before are active, or weights may have changed."""
        self.manager = manager
        self.side: Side = side
        self._on_change = on_change
        self.on_staged: Callable[[], None] = lambda: None  # called in the thread; wakes a sleeping engine
        self._fault = fault
        self._ranks = ranks
        self._waiting: deque[tuple[str, Change]] = deque()
        self._running: _Running | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    @property
    def pending(self) -> bool:
        """Whether a change is not committed yet."""
        return self._running is not None

    @property
    def staged_here(self) -> bool:
        """Whether a change only waits for other ranks."""
        return self._running is not None and self._running.staged.done()

    def begin(self, change_id: str, change: Change) -> None:
        """Queue a change."""
        self._waiting.append((change_id, change))
        self._next()

    def finish(self, *, weights_too: bool) -> list[LorasChanged | LorasRefused]:
        """Commit what has been staged on all ranks; returns at once when nothing has."""
        answers: list[LorasChanged | LorasRefused] = []
        while self._running is not None:
            found = self._everywhere(self._running.staged)
            if not all(staging.done for staging in found):
                break
            running, self._running = self._running, None
            answers.append(self._commit(running, found, weights_too))
            self._next()
        return answers

    def run(self, change: Change, *, weights_too: bool) -> LorasChanged:
        """One change from beginning to end, in this thread. Raises: the change's error, PeerLost."""
        assert not self.pending, "a synchronous engine has one change at a time"
        began = time.monotonic()
        staged: Future[Staged] = Future()
        try:
            staged.set_result(self._stage(self.manager.stager(), change))
        except Exception as error:
            if self._ranks.alone:
                raise
            staged.set_exception(error)
        changed = self._finished(staged, self._everywhere(staged), weights_too)
        return LorasChanged("", self.manager.state, changed, time.monotonic() - began, self.side)

    def _next(self) -> None:
        if self._running is None and self._waiting:
            change_id, change = self._waiting.popleft()
            staged = self._thread.submit(self._stage, self.manager.stager(), change)
            self._running = _Running(change_id, time.monotonic(), staged)
            staged.add_done_callback(lambda _: self.on_staged())

    def _stage(self, stager: Stage, change: Change) -> Staged:
        self._fault.trip("adapter")
        return stager.stage(change)

    def _everywhere(self, staged: Future[Staged]) -> list[Staging]:
        """How far the change is on every rank."""
        if self._ranks.alone:
            return [Staging(staged.done())]
        return [decode_staging(frame) for frame in self._ranks.gather(encode(_staging(staged)))]

    def _commit(self, running: _Running, found: list[Staging], weights_too: bool) -> LorasChanged | LorasRefused:
        try:
            changed = self._finished(running.staged, found, weights_too)
        except PeerLost:
            raise
        except MmgenError as error:
            return LorasRefused(running.id, info_of(error))
        except Exception as error:  # told to the one who asked; the log has the rest
            log.exception("the change of adapters %s failed", running.id)
            return LorasRefused(running.id, info_of(as_change_error(error)))
        return LorasChanged(running.id, self.manager.state, changed, time.monotonic() - running.began, self.side)

    def _finished(self, staging: Future[Staged], found: list[Staging], weights_too: bool) -> bool:
        if not self._ranks.alone:
            _check(found)
        staged, active = staging.result(), self.manager.state.active
        self.manager.commit(staged, weights_too=weights_too)
        if weights_too or self.manager.state.active != active:
            self._on_change()
        return staged.changed


def _staging(staged: Future[Staged]) -> Staging:
    if not staged.done():
        return Staging(False)
    error = staged.exception()
    if error is None:
        state = staged.result().state
        files = [info.digest for info in state.loaded]
        return Staging(True, found=(*files, *(tree for tree, merged in sorted(state.merged.items()) if merged)))
    if isinstance(error, MmgenError):
        return Staging(True, info_of(error))
    log.error("a change of adapters failed", exc_info=error)
    return Staging(True, info_of(as_change_error(error)))


def _check(found: list[Staging]) -> None:
    """Raises: the first rank's error; AdapterError where ranks found different files."""
    failed = next((staging.error for staging in found if staging.error is not None), None)
    if failed is not None:
        raise from_code(failed.code, failed.message, failed.param)
    if any(staging.found != found[0].found for staging in found):
        raise AdapterError(
            "The ranks found different adapter files at this path: it was changed meanwhile, or is not the same file "
            "on every machine. Nothing was changed; try again."
        )


def as_change_error(error: BaseException) -> MmgenError:
    """What the one who asked for a change is told of an unexpected failure."""
    if isinstance(error, Exception) and is_out_of_memory(error):
        return OutOfMemory("There was not enough memory for this change of adapters; all is as it was before.")
    return GenerationFailed(
        f"The change of adapters failed ({type(error).__name__}), and all is as it was before; the log has more."
    )
