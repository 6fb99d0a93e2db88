"""The engine proper: a scheduler, a loaded pipeline and the one denoising loop. Synchronous, single-threaded.

The worker process and `DiffGenerator` both drive it: `add`, `cancel`, then `step` until `idle`. What happens comes
back as messages; no exception leaves `step`, but for `PeerLost`, after which the ranks cannot go on together.

Several ranks run it in step: each calls the same methods in the same order with the same arguments, and `clock` says
the same on all of them. Nothing here may decide by anything else: not by measured time, not by what is in a cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from multimodal_gen.adapters import Change, LoraState, RestoreLora
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.active import Active, gauges_of, preview_steps, resume, state_of
from multimodal_gen.engine.attempt import Attempts
from multimodal_gen.engine.changes import Changes
from multimodal_gen.engine.computing import settle
from multimodal_gen.engine.decoding import Decode, Decoding
from multimodal_gen.engine.failures import as_ours, info_of
from multimodal_gen.engine.faults import Fault
from multimodal_gen.engine.pace import Pace
from multimodal_gen.engine.ranks import Ranks
from multimodal_gen.engine.scheduler import Scheduler, Slot
from multimodal_gen.engine.sleep import Sleeper
from multimodal_gen.errors import (
    Cancelled,
    DeadlineExceeded,
    MmgenError,
    OutOfMemory,
    Overflowed,
    UserError,
    WeightsUnavailable,
)
from multimodal_gen.lora.applied import WeightsKey
from multimodal_gen.lora.manager import LoraManager
from multimodal_gen.lora.sources import start_change
from multimodal_gen.media.arrays import from_numpy
from multimodal_gen.memory.host import keep_freed_memory, share_freed_memory
from multimodal_gen.messages import (
    Array,
    Checkpoint,
    Event,
    Failed,
    Finished,
    Frames,
    Gauges,
    LorasChanged,
    MemoryChanged,
    Preview,
    Progress,
    RowState,
    Sleep,
    Started,
    Wake,
)
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.pipelines import registry
from multimodal_gen.pipelines.contract import Pipeline, Row
from multimodal_gen.request import AnyRequest, ModelCard

log = logging.getLogger(__name__)

NO_SICKNESS = (UserError, WeightsUnavailable)  # say nothing of the process: files that are gone may come back
BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}


class EngineCore:
    """One model and everything that is asked of it."""

    def __init__(
        self,
        card: ModelCard,
        config: EngineConfig,
        ranks: Ranks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Loads the model, or this rank's share of it; `clock` decides about deadlines.

        Raises: CorruptModel, ConfigError, PeerLost.
        """
        self.config = config
        self.ranks = ranks or Ranks(Mesh.solo())
        self.fault = Fault.parse(config.fault, self.ranks.mesh.rank)
        self.fault.trip("load")
        settle(config)
        share_freed_memory()  # before reading starts threads; what they keep, they keep
        self.pipeline: Pipeline = registry.load(card, config, self.ranks.mesh)
        device = torch.device(self.pipeline.info.device).type
        if device == "cpu":
            keep_freed_memory()
        self.scheduler = Scheduler(config.max_batch_tokens or BATCH_TOKENS[device], card.exclusive, clock)
        targets = registry.find(card.pipeline_class).adapters
        self.loras = LoraManager(
            targets, self.pipeline.trees, config, partial(self.fault.trip, "merge"), self.ranks.mesh.control
        )
        self.decoding, self._pace = Decoding(), Pace(self.pipeline.info.device)
        self._clock = clock
        self.changes = Changes(self.loras, self.fault, self.ranks, self.pipeline.forget)
        self._attempt = Attempts(self.ranks, self.pipeline.reset)
        on_wake = partial(self.fault.trip, "wake")
        self.sleeper = Sleeper(self.pipeline, self.loras, self.ranks, self._attempt, config.load_timeout_s, on_wake)
        self._weights: WeightsKey | None = ()  # what the weights hold on every rank; None: not known
        self._active: dict[str, Active] = {}
        self._failures = self._cached_steps = 0  # requests failed in a row, cached steps of those finished

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
            self.sleeper.check_awake()
            adapters = self.loras.apply(request)
        except Exception as error:
            if not isinstance(error, MmgenError):
                log.error("request %s could not be admitted", request.id, exc_info=error)
            return [Failed(request.id, info_of(as_ours(error)))]
        states = {state.index: state for state in resume}
        self._active[request.id] = Active(request, time.monotonic(), adapters, self.loras.pin(request), states)
        self.scheduler.add(request, adapters.weights)
        return [LorasChanged("", self.loras.state, True, 0.0)] if self.loras.note(request) else []

    def cancel(self, request_id: str) -> list[Event]:
        """Drop a request before its next step; an unknown id is one that has just finished."""
        if request_id not in self._active:
            return []
        return [self._drop(request_id, Cancelled("The request was cancelled."))]

    def rest(self, order: Sleep | Wake) -> MemoryChanged:
        """Sleep, or wake; between steps, with nothing to do and no change of adapters under way. Raises: PeerLost."""
        assert self.idle, "requests are finished before the engine sleeps"
        assert not self.changes.pending, "changes of adapters are, too"
        return self.sleeper.obey(order)

    # --- adapters -----------------------------------------------------------------------------------------------

    def bring_adapters(self, state: LoraState | None) -> None:
        """Before the first request: the adapters of the engine before this one, or those of the configuration.

        Raises: the AdapterError family.
        """
        change = start_change(self.config) if state is None else RestoreLora(state=state) if state.loaded else None
        if change is not None:
            self._weights = None
            self.changes.run(change, weights_too=True)

    def change_adapters(self, change: Change) -> LorasChanged:
        """A transaction, done when this returns. Raises: the AdapterError family, Asleep."""
        self.sleeper.check_awake()
        self._weights = None
        return self.changes.run(change, weights_too=self._weights_are_free)

    def finish_changes(self) -> list[Event]:
        """Commit the changes that are staged; to be called between steps."""
        answers = self.changes.finish(weights_too=self._weights_are_free)
        if answers:
            self._weights = None
        return [*answers]

    @property
    def _weights_are_free(self) -> bool:
        return self.scheduler.running_rows == 0

    # --- steps --------------------------------------------------------------------------------------------------

    def step(self, most_tokens: int | None = None) -> Iterator[Event]:
        """One denoising step of the rows that the scheduler picks, or a piece of decoding; yields what happens.

        `most_tokens`: of all rows together, where somebody waits for the step to end; one row runs at least.

        The step runs while the iterator is consumed; `Started` comes before any work on its request, so that whoever
        watches knows which requests a crash took down.
        """
        for request_id in self.scheduler.expired():
            yield self._drop(request_id, DeadlineExceeded("The request's deadline passed before it was finished."))
        if self.decoding.due(self._clock(), steps=self.scheduler.steps):
            yield from self._decode(self.decoding.waiting[0])
            yield self._gauges()  # a piece may leave nothing, and whoever watches must hear that it is done
            return
        self.decoding.step(self._clock())
        slots = self.scheduler.plan(most_tokens)
        for slot in slots:
            if not (active := self._active[slot.request_id]).started:
                active.started = True
                active.timings.queue = time.monotonic() - active.arrived
                yield Started(slot.request_id)
        begin, events = time.monotonic(), list[Event]()
        stalled = self.pipeline.memory.use.stall_seconds
        rows = self._denoise(self._start(self._on_their_weights(slots, events), events), events)
        yield from events
        tokens = sum(self.scheduler.tokens(row.request.id) for row in rows)
        for row in rows:
            yield Progress(row.request.id, row.index, row.step, row.request.num_inference_steps, row is not rows[-1])
        for row in rows:
            if row.request.id in self._active:
                yield from self._after_step(row)
        if rows:
            stall = self.pipeline.memory.use.stall_seconds - stalled
            seconds = time.monotonic() - begin
            yield self._gauges(step_seconds=seconds, step_rows=len(rows), step_tokens=tokens, step_stall_seconds=stall)

    def _gauges(self, **step: float) -> Gauges:
        totals = {"cached_steps": self._cached_steps, "weights": self.sleeper.weights}
        return gauges_of(self._active.values(), self.scheduler, self.pipeline.info.cache, **totals, **step)

    # --- the parts of a step ------------------------------------------------------------------------------------

    def _on_their_weights(self, slots: list[Slot], events: list[Event]) -> list[Slot]:
        """The slots, once the weights hold what they share; a merge that fails ends their requests."""
        if not slots:
            return slots
        wanted = self._active[slots[0].request_id].adapters.weights
        if wanted == self._weights:
            return slots
        error = self._attempt("merging adapters", partial(self.loras.set_weights, wanted))
        self._weights = wanted if error is None else None
        self.pipeline.forget()  # recordings know where weights were
        if error is not None:
            self._failures += not isinstance(error, NO_SICKNESS)
            events += [self._drop(request_id, error) for request_id in dict.fromkeys(s.request_id for s in slots)]
        return slots if error is None else []

    def _start(self, slots: list[Slot], events: list[Event]) -> list[Row]:
        """Rows of the plan; new ones are encoded and prepared."""
        rows: list[Row] = []
        for slot in slots:
            active = self._active.get(slot.request_id)
            if active is None:  # a sibling row of the same request failed a moment ago
                continue
            prepare = partial(self._prepare, active, slot.index)
            if slot.starts and not self._guarded("encoding", active, events, prepare):
                rows = [row for row in rows if row.request.id != slot.request_id]
                continue
            rows.append(active.rows[slot.index])
        return rows

    def _prepare(self, active: Active, index: int) -> None:
        begin = time.monotonic()
        active.adapters = self.loras.equip(active.adapters)
        row = Row(active.request, index, active.adapters)
        active.rows[index] = row
        self.fault.trip("encode")
        self.pipeline.encode([row])
        self.fault.trip("prepare")
        self.pipeline.prepare(row)
        if index in active.states:
            resume(row, active.states.pop(index), torch.device(self.pipeline.info.device))
        assert row.conditions is not None, "encode() fills row.conditions"
        if row.conditions.row_tokens is not None:
            self.scheduler.set_tokens(active.request.id, row.conditions.row_tokens)
        active.conditions, active.prompt_tokens = row.conditions, row.conditions.prompt_tokens
        active.warnings = list(row.conditions.warnings)
        active.timings.encode += time.monotonic() - begin

    def _denoise(self, rows: list[Row], events: list[Event]) -> list[Row]:
        """Advance rows by one step; when a batch fails, each row is tried alone, so one cannot take others down."""
        if not rows:
            return []
        begin = time.monotonic()
        if len(rows) == 1 or not self._batch_succeeds(rows):
            rows = [row for row in rows if self._denoise_alone(row, events)]
            rows = [row for row in rows if row.request.id in self._active]  # a later sibling may have failed
        elapsed = time.monotonic() - begin
        for request_id in {row.request.id for row in rows}:
            self._active[request_id].timings.denoise += elapsed
        return rows

    def _batch_succeeds(self, rows: list[Row]) -> bool:
        error = self._attempt(f"a step of {len(rows)} rows", partial(self._step_rows, rows), rows)
        if error is None:
            return True
        log.error("trying each of %d rows alone", len(rows))
        if isinstance(error, OutOfMemory):
            tokens = sum(self.scheduler.tokens(row.request.id) for row in rows)
            self.scheduler.max_batch_tokens = max(1, tokens // 2)
            log.warning("steps are limited to %d tokens from now on", self.scheduler.max_batch_tokens)
        return False

    def _step_rows(self, rows: list[Row]) -> None:
        self.fault.trip("denoise")
        self.pipeline.denoise(rows)
        self._pace.after_step()

    def _denoise_alone(self, row: Row, events: list[Event]) -> bool:
        active = self._active.get(row.request.id)
        step = partial(self._step_rows, [row])
        return active is not None and self._guarded("a step", active, events, step, [row])

    def _after_step(self, row: Row) -> list[Event]:
        active, events = self._active[row.request.id], list[Event]()
        if row.finished:
            return self._to_pixels(active, row)
        if row.request.checkpoint_every and row.step % row.request.checkpoint_every == 0:
            events.append(Checkpoint(row.request.id, state_of(row)))
        steps = preview_steps(row.request.num_inference_steps, row.request.previews)
        if row.step in steps:
            begin, made = time.monotonic(), list[Array]()
            if self._guarded("decoding", active, events, lambda: made.append(from_numpy(self.pipeline.preview(row)))):
                active.timings.decode += time.monotonic() - begin
                events.append(Preview(row.request.id, row.index, steps.index(row.step), made[0]))
        return events

    def _to_pixels(self, active: Active, row: Row) -> list[Event]:
        """The steps of a row are done."""
        row.history = row.history.counted()
        if row.request.output == "latent":
            assert row.latents is not None, "prepare() fills row.latents"
            return self._finish(active, row, from_numpy(row.latents.float().cpu().numpy()))
        self.scheduler.decode(row.request.id, row.index)
        decode, events = Decode(row, self.pipeline.decode(row)), list[Event]()
        self.decoding.waiting.append(decode)
        while not self.pipeline.memory.alternates and decode in self.decoding.waiting:
            events += self._decode(decode)  # all of it: between pieces the decoder's weights would leave
        return events

    def _decode(self, decode: Decode) -> list[Event]:
        """A piece of it, and the end of the row where it is the last."""
        row, begin, events, left = decode.row, time.monotonic(), list[Event](), list[Frames | None]()
        active = self._active[row.request.id]

        def advance() -> None:
            self.fault.trip("decode")
            left.append(decode.advance(_merged(active)))

        if not self._guarded("decoding", active, events, advance):
            return events
        active.timings.decode += time.monotonic() - begin
        events += [frames for frames in left if frames is not None]
        if decode.done:
            self.decoding.waiting.remove(decode)
            events += self._finish(active, row, None if decode.leaves else decode.output)
        return events

    def _finish(self, active: Active, row: Row, output: Array | None) -> list[Event]:
        request, timings = row.request, active.timings
        if output is not None:
            active.outputs[row.index] = output
        timings.cached_steps += row.history.skipped
        self.pipeline.release(active.rows.pop(row.index))
        if not self.scheduler.finish(request.id, row.index):
            return []
        timings.total = time.monotonic() - active.arrived
        timings.steps = request.num_inference_steps
        outputs = [active.outputs[index] for index in sorted(active.outputs)]
        del self._active[request.id]
        active.unpin()
        self._failures = 0
        self._cached_steps += timings.cached_steps
        return [Finished(request.id, outputs, timings, active.prompt_tokens, active.warnings, _merged(active))]

    # --- failure ------------------------------------------------------------------------------------------------

    def _guarded(
        self, what: str, active: Active, events: list[Event], work: Callable[[], None], rows: Sequence[Row] = ()
    ) -> bool:
        """Run work for one request; its failure, on any rank, ends that request and nothing else."""
        error = self._attempt(f"{what} of request {active.request.id}", work, rows)
        if error is None:
            return True
        # Numbers that overflow under adapters say nothing of the process's health.
        excused = isinstance(error, NO_SICKNESS) or (isinstance(error, Overflowed) and active.request.loras)
        self._failures += not excused
        events.append(self._drop(active.request.id, error))
        return False

    def _drop(self, request_id: str, error: MmgenError) -> Failed:
        active = self._active.pop(request_id)
        active.unpin()
        self.scheduler.remove(request_id)
        self.decoding.drop(request_id)
        for row in active.rows.values():
            self.pipeline.release(row)
        return Failed(request_id, info_of(error))


def _merged(active: Active) -> tuple[str, ...]:
    return tuple(tree for tree, _ in active.adapters.weights)
