"""What one rank hosts: pictures, text, or both. One step at a time, of the side that the arbiter names.

Several ranks run it in step, as `EngineCore` itself: what is chosen follows from the clocks of the turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec
import torch

from multimodal_gen.adapters import LoraState, LoraStates, Side
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.arbiter import Arbiter
from multimodal_gen.engine.changes import Changes
from multimodal_gen.engine.computing import settle
from multimodal_gen.engine.ranks import Ranks
from multimodal_gen.messages import (
    Cancel,
    ChangeLoras,
    Event,
    Gauges,
    Generate,
    GenerateText,
    MemoryChanged,
    Ready,
    Sleep,
    Wake,
)
from multimodal_gen.observe.status_log import Standing
from multimodal_gen.request import ModelCard
from multimodal_gen.text import TextCard

if TYPE_CHECKING:
    from multimodal_gen.engine.core import EngineCore
    from multimodal_gen.engine.text import TextSide

Work = Generate | GenerateText | Cancel | ChangeLoras | Sleep | Wake


class Part(Protocol):
    """One side of the engine."""

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do."""

    @property
    def sick(self) -> bool:
        """Whether the process is not to be trusted any more."""

    def cancel(self, request_id: str) -> list[Event]:
        """Drop a request before its next step; unknown ids are ignored."""

    def step(self) -> Iterator[Event]:
        """One step; yields what happens, as it happens."""

    def rest(self, order: Sleep | Wake) -> MemoryChanged:
        """Sleep, or wake."""


@dataclass(frozen=True)
class _Running:
    """A step whose time is known when the next turn begins."""

    side: Side
    began: float
    busy: frozenset[Side]  # who had work when it was chosen
    tokens: int  # of a denoising step
    piece: bool  # of decoding, instead of a denoising step


class Host:
    """All that runs in one worker."""

    def __init__(
        self,
        pictures: ModelCard | None,
        text: TextCard | None,
        config: EngineConfig,
        ranks: Ranks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Loads the models, text first: how pictures share the memory depends on what is left.

        Raises: CorruptModel, ConfigError, OutOfMemory, PeerLost.
        """
        self.ranks = ranks
        self._clock = clock
        self._arbiter = Arbiter(config.tpot_budget_ms / 1000)
        self._running: _Running | None = None
        settle(config)
        self.text: TextSide | None = None
        self.pictures: EngineCore | None = None
        if text is not None:
            from multimodal_gen.engine.text import TextSide

            self.text = TextSide(text, config, ranks, clock)
        if pictures is not None:
            from multimodal_gen.engine.core import EngineCore

            self.pictures = EngineCore(pictures, config, ranks, clock)
        if self.text is not None:
            # Last: it imports in a thread, and two threads that import transformers see halves of it.
            self.text.core.matchers.prepare()

    @property
    def parts(self) -> dict[Side, Part]:
        """What there is."""
        found: dict[Side, Part] = {}
        if self.pictures is not None:
            found["pictures"] = self.pictures
        if self.text is not None:
            found["text"] = self.text
        return found

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do."""
        return all(part.idle for part in self.parts.values())

    @property
    def sick(self) -> bool:
        """Whether the process is not to be trusted any more."""
        return any(part.sick for part in self.parts.values())

    @property
    def waits_for_ranks(self) -> bool:
        """Whether a change of adapters is staged here and waits for the other ranks."""
        return any(changes.staged_here for changes in self.changes)

    @property
    def changes(self) -> list[Changes]:
        """Of adapters, of both sides."""
        return [part.changes for part in (self.pictures, self.text) if part is not None]

    def ready(self, load_seconds: float) -> Ready:
        """What the front is told once all is loaded."""
        text = None if self.text is None else self.text.info
        if self.pictures is None:
            assert self.text is not None, "an engine hosts something"
            text = self.text.info
            return Ready(
                text.device,
                text.dtype,
                text.backend,
                text.parameters,
                load_seconds,
                threads=torch.get_num_threads(),
                rests=True,
                loras=self._adapters,
                text=text,
            )
        core, info = self.pictures, self.pictures.pipeline.info
        return Ready(
            info.device,
            info.dtype,
            info.attention_backend,
            info.parameters,
            load_seconds,
            threads=core.threads,
            max_batch_tokens=core.scheduler.max_batch_tokens,
            targets=tuple(core.pipeline.trees),
            loras=self._adapters,
            plan=core.sleeper.plan,
            weights=core.sleeper.weights,
            rests=core.sleeper.plan is not None,
            text=text,
        )

    def standings(self) -> list[Standing]:
        """What each side has in its hands."""
        schedulers = {
            "pictures": None if self.pictures is None else self.pictures.scheduler,
            "text": None if self.text is None else self.text.core.scheduler,
        }
        return [
            Standing(side, tuple(scheduler.running_ids), tuple(scheduler.queued_ids))
            for side, scheduler in schedulers.items()
            if scheduler is not None
        ]

    @property
    def _adapters(self) -> LoraStates:
        pictures = LoraState() if self.pictures is None else self.pictures.loras.state
        return LoraStates(pictures, LoraState() if self.text is None else self.text.core.adapters.state)

    # --- turns ----------------------------------------------------------------------------------------------------

    def begin_turn(self) -> None:
        """The clock has moved on: the step before this turn is over."""
        running, self._running = self._running, None
        if running is not None:
            seconds = self._clock() - running.began
            busy = running.busy
            self._arbiter.ran(
                running.side,
                seconds,
                pictures="pictures" in busy,
                text="text" in busy,
                tokens=running.tokens,
                piece=running.piece,
            )
            if running.side == "text" and self.pictures is not None:
                self.pictures.decoding.others_took(seconds)

    def take(self, message: Work) -> Iterable[Event]:
        """Do what the front asks, between two steps."""
        if isinstance(message, Cancel):
            return [event for part in self.parts.values() for event in part.cancel(message.request_id)]
        if isinstance(message, (Sleep, Wake)):
            return [self._rest(message), *([] if self.text is None or self.text.asleep else [self.text.core.gauges()])]
        if isinstance(message, GenerateText):
            assert self.text is not None, "the front knows that no text is written here"
            return self.text.add(message.request)
        if isinstance(message, ChangeLoras):
            changes = next(each for each in self.changes if each.side == message.side)
            changes.begin(message.id, message.change)
            return []
        assert self.pictures is not None, "the front knows that no pictures are made here"
        return self.pictures.add(message.request, message.resume)

    def finish_changes(self) -> list[Event]:
        """Commit the changes of adapters that are staged."""
        return [event for part in (self.pictures, self.text) if part is not None for event in part.finish_changes()]

    def step(self) -> Iterator[Event]:
        """One step of one side."""
        parts = self.parts
        busy = frozenset(side for side, part in parts.items() if not part.idle)
        side = self._arbiter.choose(pictures="pictures" in busy, text="text" in busy)
        if side is None:
            return
        began, tokens, piece = self._clock(), 0, False
        for event in self._steps(side, busy):
            if isinstance(event, Gauges):
                tokens, piece = event.step_tokens, not event.step_rows
            yield event
        if not self.idle:  # else rank 0 sleeps before the next turn
            self._running = _Running(side, began, busy, tokens, piece)

    def _steps(self, side: Side, busy: frozenset[Side]) -> Iterator[Event]:
        if side == "text" or self.pictures is None:
            return self.parts[side].step()
        return self.pictures.step(self._arbiter.most_tokens(text="text" in busy))

    def _rest(self, order: Sleep | Wake) -> MemoryChanged:
        """Both sides sleep, or both wake; where one cannot wake, both sleep."""
        done = [part.rest(order) for part in self.parts.values()]
        error = next((each.error for each in done if each.error is not None), None)
        if error is not None and isinstance(order, Wake):
            for part in self.parts.values():
                part.rest(Sleep(order.id))
        whole = done[0]  # of pictures, where there are any: they know of weights
        return msgspec.structs.replace(
            whole,
            seconds=sum(each.seconds for each in done),
            freed_bytes=sum(each.freed_bytes for each in done),
            error=error,
        )
