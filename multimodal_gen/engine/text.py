"""The text side of an engine: `TextCore`, a vote on what may fail, and what the front is told beside the answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

from multimodal_gen.adapters import Change, LoraState, RestoreLora
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.attempt import agreed
from multimodal_gen.engine.changes import Changes
from multimodal_gen.engine.failures import info_of
from multimodal_gen.engine.faults import Fault
from multimodal_gen.engine.ranks import Ranks
from multimodal_gen.errors import Asleep, MmgenError, PeerLost
from multimodal_gen.llm.adapter_names import start_change
from multimodal_gen.llm.core import TextCore
from multimodal_gen.memory.device import release_device_memory
from multimodal_gen.memory.host import release_freed_memory
from multimodal_gen.messages import Event, LorasChanged, MemoryChanged, Sleep, Wake
from multimodal_gen.text import TextCard, TextInfo, TextRequest

GAUGE_SECONDS = 0.25  # between two gauges while answers are written; the front hears of every step by its deltas

log = logging.getLogger(__name__)


class TextSide:
    """A language model and everything that is asked of it."""

    def __init__(
        self, card: TextCard, config: EngineConfig, ranks: Ranks, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Loads the model. Raises: CorruptModel, ConfigError, OutOfMemory, PeerLost."""
        self._ranks = ranks
        self._attempt = partial(agreed, ranks)
        self._load_timeout_s = config.load_timeout_s
        self.core = TextCore(card, config, ranks.mesh, clock, self._attempt)
        self.changes = Changes(self.core.adapters, Fault.parse(config.fault, ranks.mesh.rank), ranks, side="text")
        self._config = config
        self.asleep = False
        self._told = 0.0  # monotonic seconds of the latest gauges

    @property
    def info(self) -> TextInfo:
        """What is loaded."""
        return self.core.info

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do."""
        return self.core.idle

    @property
    def sick(self) -> bool:
        """Whether the process is not to be trusted any more."""
        return self.core.sick

    def add(self, request: TextRequest) -> list[Event]:
        """Queue a request; it joins at the next step."""
        return self.core.add(request)

    def cancel(self, request_id: str) -> list[Event]:
        """Drop a request before its next step; an unknown id is one that has just finished."""
        events = self.core.cancel(request_id)
        return [*events, self.core.gauges()] if events else []  # there may be no step any more that would tell

    def step(self) -> Iterator[Event]:
        """One forward; yields what happens, as it happens."""
        heard = False
        for event in self.core.step():
            heard = True
            yield event
        now = time.monotonic()
        if self.idle or not heard or now - self._told >= GAUGE_SECONDS:
            self._told = now
            yield self.core.gauges()

    # --- adapters ---------------------------------------------------------------------------------------------------

    def bring_adapters(self, state: LoraState | None) -> None:
        """Before the first request: the adapters of the engine before this one, or those of the configuration.

        Raises: the AdapterError family for those of the configuration; the others are `missing` where they fail.
        """
        if state is None:
            change = start_change(self._config)
            if change is not None:
                self.changes.run(change, weights_too=False)
            return
        try:
            self.changes.run(RestoreLora(state=state), weights_too=False)
        except PeerLost:
            raise
        except Exception as error:
            log.exception("the adapters of the worker before could not be brought back")
            why = error.message if isinstance(error, MmgenError) else f"Loading it failed ({type(error).__name__})."
            self.core.adapters.lose(state, why)

    def change_adapters(self, change: Change) -> LorasChanged:
        """A transaction, done when this returns. Raises: the AdapterError family, Asleep."""
        if self.asleep:
            raise Asleep("The model is asleep and its memory is given back; wake it first.")
        return self.changes.run(change, weights_too=False)

    def finish_changes(self) -> list[Event]:
        """Commit the changes that are staged; to be called between steps."""
        return [*self.changes.finish(weights_too=False)]

    # --- sleep ------------------------------------------------------------------------------------------------------

    def rest(self, order: Sleep | Wake) -> MemoryChanged:
        """Sleep or wake; nothing happens where that is so already. After an error it sleeps. Raises: PeerLost."""
        assert self.idle, "requests are finished before the engine sleeps"
        if self.asleep == isinstance(order, Sleep):
            return MemoryChanged(order.id, 0.0)
        began, held = time.monotonic(), self.info.weight_bytes + self.info.kv_bytes
        if isinstance(order, Sleep):
            error = self._sleep()
            return self._told_of(order, began, error, 0 if error else held)
        error = self._attempt("waking the language model", self.core.wake, patience_s=self._load_timeout_s)
        self.asleep = False
        if error is not None:  # some ranks may be awake, and an engine is on all ranks or on none
            self._sleep()
        return self._told_of(order, began, error, 0)

    def _sleep(self) -> MmgenError | None:
        error = self._attempt("putting the language model to sleep", self.core.sleep)
        self.asleep = True
        release_freed_memory()
        release_device_memory()
        return error

    def _told_of(self, order: Sleep | Wake, began: float, error: MmgenError | None, freed: int) -> MemoryChanged:
        told = None if error is None else info_of(error)
        return MemoryChanged(order.id, time.monotonic() - began, freed, error=told)
