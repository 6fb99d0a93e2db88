"""The engine proper: a scheduler, a loaded pipeline and the one denoising loop. Synchronous, single-threaded.

The worker process and `DiffGenerator` both drive it: `add`, `cancel`, then `step` until `idle`. What happens comes
back as messages; an exception never leaves `step`.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from multimodal_gen.adapters import Change, LoraState, RestoreLora
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.changes import Changes
from multimodal_gen.engine.faults import Fault
from multimodal_gen.engine.scheduler import Scheduler, Slot
from multimodal_gen.errors import (
    Cancelled,
    DeadlineExceeded,
    GenerationFailed,
    MmgenError,
    OutOfMemory,
    Overflowed,
    UserError,
)
from multimodal_gen.lora.applied import Applied
from multimodal_gen.lora.manager import LoraManager
from multimodal_gen.lora.sources import start_change
from multimodal_gen.media.arrays import from_numpy, to_numpy
from multimodal_gen.memory.failures import is_out_of_memory
from multimodal_gen.memory.host import keep_freed_memory
from multimodal_gen.messages import (
    Array,
    Checkpoint,
    ErrorInfo,
    Event,
    Failed,
    Finished,
    Gauges,
    LorasChanged,
    Preview,
    Progress,
    RowState,
    Started,
)
from multimodal_gen.pipelines import registry
from multimodal_gen.pipelines.contract import Pipeline, Row
from multimodal_gen.request import AnyRequest, ModelCard, Timings

log = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}


@dataclass
class Active:
    """A request that the engine holds."""

    request: AnyRequest  # filled by add
    arrived: float  # filled by add: clock time
    adapters: Applied  # filled by add; overlays when the first row starts
    unpin: Callable[[], None]  # filled by add: lets go of the request's adapters
    states: dict[int, RowState]  # filled by add: where rows go on that another process has begun
    started: bool = False  # set when its first row is planned
    rows: dict[int, Row] = field(default_factory=dict)  # filled when a row starts, emptied when it is decoded
    outputs: dict[int, Array] = field(default_factory=dict)  # filled when a row is decoded
    timings: Timings = field(default_factory=Timings)  # filled step by step
    prompt_tokens: int = 0  # filled by encode
    warnings: list[str] = field(default_factory=list)  # filled by encode


class EngineCore:
    """One model and everything that is asked of it."""

    def __init__(self, card: ModelCard, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Loads the model. Raises: CorruptModel, ConfigError."""
        self.config = config
        self.fault = Fault.parse(config.fault)
        self.fault.trip("load")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.pipeline: Pipeline = registry.load(card, config)
        device = torch.device(self.pipeline.info.device).type
        if device == "cpu":
            keep_freed_memory()
        self.scheduler = Scheduler(config.max_batch_tokens or BATCH_TOKENS[device], card.exclusive, clock)
        targets = registry.find(card.pipeline_class).adapters
        self.loras = LoraManager(targets, self.pipeline.trees, config, partial(self.fault.trip, "merge"))
        self.changes = Changes(self.loras, self.fault, self.pipeline.forget)
        self._clock = clock
        self._active: dict[str, Active] = {}
        self._failures = 0  # requests failed in a row

    @property
    def threads(self) -> int:
        """CPU threads of a forward."""
        return torch.get_num_threads()

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do."""
        return self.scheduler.idle

    @property
    def sick(self) -> bool:
        """Whether so many requests failed in a row that the process is not to be trusted any more."""
        return self.loras.broken or self._failures >= self.config.max_consecutive_errors

    def add(self, request: AnyRequest, resume: Sequence[RowState] = ()) -> list[Event]:
        """Queue a request; it joins at the next step. Its adapters are settled now, whatever changes later.

        `resume` are states of its rows, from another process.
        """
        try:
            adapters = self.loras.apply(request)
        except Exception as error:
            if not isinstance(error, MmgenError):
                log.error("request %s could not be admitted", request.id, exc_info=error)
            told = _as_ours(error)
            return [Failed(request.id, ErrorInfo(told.code, told.message, told.param))]
        states = {state.index: state for state in resume}
        self._active[request.id] = Active(request, self._clock(), adapters, self.loras.pin(request), states)
        self.scheduler.add(request, adapters.weights)
        return [LorasChanged("", self.loras.state, True, 0.0)] if self.loras.note(request) else []

    def cancel(self, request_id: str) -> list[Event]:
        """Drop a request before its next step; an unknown id is one that has just finished."""
        if request_id not in self._active:
            return []
        return [self._drop(request_id, Cancelled("The request was cancelled."))]

    # --- adapters -----------------------------------------------------------------------------------------------

    def bring_adapters(self, state: LoraState | None) -> None:
        """Before the first request: the adapters of the engine before this one, or those of the configuration.

        Raises: the AdapterError family.
        """
        change = start_change(self.config) if state is None else RestoreLora(state=state) if state.loaded else None
        if change is not None:
            self.changes.run(change, weights_too=True)

    def change_adapters(self, change: Change) -> LorasChanged:
        """A transaction, done when this returns. Raises: the AdapterError family."""
        return self.changes.run(change, weights_too=self._weights_are_free)

    def finish_changes(self) -> list[Event]:
        """Commit the changes that are staged; to be called between steps."""
        return [*self.changes.finish(weights_too=self._weights_are_free)]

    @property
    def _weights_are_free(self) -> bool:
        return self.scheduler.running_rows == 0

    # --- steps --------------------------------------------------------------------------------------------------

    def step(self) -> Iterator[Event]:
        """Run one denoising step for the rows that the scheduler picks; yields what happens, as it happens.

        The step runs while the iterator is consumed; `Started` comes before any work on its request, so that whoever
        watches knows which requests a crash took down.
        """
        for request_id in self.scheduler.expired():
            yield self._drop(request_id, DeadlineExceeded("The request's deadline passed before it was finished."))
        slots = self.scheduler.plan()
        for slot in slots:
            active = self._active[slot.request_id]
            if not active.started:
                active.started = True
                active.timings.queue = self._clock() - active.arrived
                yield Started(slot.request_id)
        begin, events = self._clock(), list[Event]()
        rows = self._denoise(self._start(self._on_their_weights(slots, events), events), events)
        yield from events
        tokens = sum(self.scheduler.tokens(row.request.id) for row in rows)
        for row in rows:
            yield Progress(row.request.id, row.index, row.step, row.request.num_inference_steps)
        for row in rows:
            if row.request.id in self._active:
                yield from self._after_step(row)
        if rows:
            yield self._gauges(len(rows), tokens, self._clock() - begin)

    # --- the parts of a step ------------------------------------------------------------------------------------

    def _on_their_weights(self, slots: list[Slot], events: list[Event]) -> list[Slot]:
        """The slots, once the weights hold what they share; a merge that fails ends their requests."""
        if not slots:
            return slots
        wanted = self._active[slots[0].request_id].adapters.weights
        error = self._attempt(partial(self.loras.set_weights, wanted))
        if error is None:
            return slots
        log.error("adapters could not be merged", exc_info=error)
        self._failures += not isinstance(error, UserError)
        events += [self._drop(request_id, _as_ours(error)) for request_id in dict.fromkeys(s.request_id for s in slots)]
        return []

    def _start(self, slots: list[Slot], events: list[Event]) -> list[Row]:
        """Rows of the plan; new ones are encoded and prepared."""
        rows: list[Row] = []
        for slot in slots:
            active = self._active.get(slot.request_id)
            if active is None:  # a sibling row of the same request failed a moment ago
                continue
            if slot.starts and not self._guarded(active, events, partial(self._prepare, active, slot.index)):
                rows = [row for row in rows if row.request.id != slot.request_id]
                continue
            rows.append(active.rows[slot.index])
        return rows

    def _prepare(self, active: Active, index: int) -> None:
        begin = self._clock()
        active.adapters = self.loras.equip(active.adapters)
        row = Row(active.request, index, active.adapters)
        active.rows[index] = row
        self.fault.trip("encode")
        self.pipeline.encode([row])
        self.fault.trip("prepare")
        self.pipeline.prepare(row)
        self._resume(row, active.states.pop(index, None))
        assert row.conditions is not None, "encode() fills row.conditions"
        if row.conditions.row_tokens is not None:
            self.scheduler.set_tokens(active.request.id, row.conditions.row_tokens)
        active.prompt_tokens = row.conditions.prompt_tokens
        active.warnings = list(row.conditions.warnings)
        active.timings.encode += self._clock() - begin

    def _resume(self, row: Row, state: RowState | None) -> None:
        if state is not None:
            device = torch.device(self.pipeline.info.device)
            arrays = {name: to_numpy(array).copy() for name, array in state.tensors.items()}
            row.restore({name: torch.from_numpy(values).to(device) for name, values in arrays.items()}, state.step)

    def _denoise(self, rows: list[Row], events: list[Event]) -> list[Row]:
        """Advance rows by one step; when a batch fails, each row is tried alone, so one cannot take others down."""
        if not rows:
            return []
        begin = self._clock()
        if len(rows) == 1 or not self._batch_succeeds(rows):
            rows = [row for row in rows if self._denoise_alone(row, events)]
            rows = [row for row in rows if row.request.id in self._active]  # a later sibling may have failed
        elapsed = self._clock() - begin
        for request_id in {row.request.id for row in rows}:
            self._active[request_id].timings.denoise += elapsed
        return rows

    def _batch_succeeds(self, rows: list[Row]) -> bool:
        error = self._attempt(partial(self._step_rows, rows))
        if error is None:
            return True
        log.error("a step of %d rows failed; trying each row alone", len(rows), exc_info=error)
        if isinstance(_as_ours(error), OutOfMemory):
            tokens = sum(self.scheduler.tokens(row.request.id) for row in rows)
            self.scheduler.max_batch_tokens = max(1, tokens // 2)
            log.warning("steps are limited to %d tokens from now on", self.scheduler.max_batch_tokens)
        return False

    def _step_rows(self, rows: list[Row]) -> None:
        self.fault.trip("denoise")
        self.pipeline.denoise(rows)

    def _denoise_alone(self, row: Row, events: list[Event]) -> bool:
        active = self._active.get(row.request.id)
        return active is not None and self._guarded(active, events, partial(self._step_rows, [row]))

    def _after_step(self, row: Row) -> list[Event]:
        active, events = self._active[row.request.id], list[Event]()
        if row.finished:
            self._guarded(active, events, partial(self._finish, active, row, events))
        else:
            events += self._checkpoint(row)
        if not row.finished and row.step in preview_steps(row.request.num_inference_steps, row.request.previews):
            self._guarded(active, events, partial(self._preview, active, row, events))
        return events

    def _checkpoint(self, row: Row) -> list[Event]:
        every = row.request.checkpoint_every
        if not every or row.step % every:
            return []
        tensors = {name: from_numpy(tensor.float().cpu().numpy()) for name, tensor in row.tensors().items()}
        return [Checkpoint(row.request.id, RowState(row.index, row.step, tensors))]

    def _preview(self, active: Active, row: Row, events: list[Event]) -> None:
        begin = self._clock()
        steps = preview_steps(row.request.num_inference_steps, row.request.previews)
        image = from_numpy(self.pipeline.preview(row))
        active.timings.decode += self._clock() - begin
        events.append(Preview(row.request.id, row.index, steps.index(row.step), image))

    def _finish(self, active: Active, row: Row, events: list[Event]) -> None:
        request = row.request
        begin = self._clock()
        if request.output == "latent":
            assert row.latents is not None, "prepare() fills row.latents"
            pixels = row.latents.float().cpu().numpy()
        else:
            self.fault.trip("decode")
            pixels = self.pipeline.decode([row])[0]
        active.outputs[row.index] = from_numpy(pixels)
        self.pipeline.release(active.rows.pop(row.index))
        timings = active.timings
        timings.decode += self._clock() - begin
        if not self.scheduler.finish(request.id, row.index):
            return
        timings.total = self._clock() - active.arrived
        timings.steps = request.num_inference_steps
        outputs = [active.outputs[index] for index in range(request.n)]
        del self._active[request.id]
        active.unpin()
        self._failures = 0
        merged = tuple(tree for tree, _ in active.adapters.weights)
        events.append(Finished(request.id, outputs, timings, active.prompt_tokens, active.warnings, merged))

    # --- failure ------------------------------------------------------------------------------------------------

    def _attempt(self, work: Callable[[], None]) -> Exception | None:
        """Run work; an exception is returned, once the memory that its traceback held is free again."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - every kind of failure has the same answer: the request's own end
            failure = error
        else:
            return None
        traceback.clear_frames(failure.__traceback__)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return failure

    def _guarded(self, active: Active, events: list[Event], work: Callable[[], None]) -> bool:
        """Run work for one request; its failure ends that request and nothing else."""
        error = self._attempt(work)
        if error is None:
            return True
        log.error("request %s failed", active.request.id, exc_info=error)
        # Numbers that overflow under adapters say nothing of the process's health.
        excused = isinstance(error, UserError) or (isinstance(error, Overflowed) and active.request.loras)
        self._failures += not excused
        events.append(self._drop(active.request.id, _as_ours(error)))
        return False

    def _drop(self, request_id: str, error: MmgenError) -> Failed:
        active = self._active.pop(request_id)
        active.unpin()
        self.scheduler.remove(request_id)
        for row in active.rows.values():
            self.pipeline.release(row)
        return Failed(request_id, ErrorInfo(error.code, error.message, error.param))

    def _gauges(self, rows: int, tokens: int, seconds: float) -> Gauges:
        cache = self.pipeline.info.cache
        return Gauges(
            running_rows=self.scheduler.running_rows,
            waiting_rows=self.scheduler.waiting_rows,
            step_seconds=seconds,
            step_rows=rows,
            step_tokens=tokens,
            cache_bytes=cache.bytes,
            cache_hits=cache.hits,
            cache_misses=cache.misses,
        )


def preview_steps(steps: int, previews: int) -> list[int]:
    """After which steps a row shows itself: evenly spread, never after the last."""
    wanted = {(i + 1) * steps // (previews + 1) for i in range(previews)}
    return sorted(wanted - {0, steps})


def _as_ours(error: Exception) -> MmgenError:
    if isinstance(error, MmgenError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("The device ran out of memory. Ask for a smaller size or fewer images.")
    return GenerationFailed(f"The model failed on this request ({type(error).__name__}); the server's log has more.")
