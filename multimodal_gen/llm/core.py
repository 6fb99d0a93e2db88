"""The engine of text: a scheduler, a loaded language model and the one loop over steps. Synchronous, single-threaded.

The worker process and `LLM` both drive it: `add`, `cancel`, then `step` until `idle`. What happens comes back as
messages; no exception leaves `step`, but for `PeerLost`.

Several ranks run it in step, as `engine/core.py` does: each plans from the same messages and the turn's clock, all take
the tokens that rank 0 chose, and nothing is decided by measured time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import (
    Asleep,
    Cancelled,
    DeadlineExceeded,
    MmgenError,
    OutOfMemory,
    Overflowed,
    PromptTooLong,
    UserError,
    WeightsUnavailable,
)
from multimodal_gen.llm.adapter_target import DECODER
from multimodal_gen.llm.adapters import TextAdapters
from multimodal_gen.llm.attempt import Attempt, attempt_alone
from multimodal_gen.llm.counts import Counts
from multimodal_gen.llm.detokenizer import Detokenizer, Piece
from multimodal_gen.llm.grammar.matcher import Matchers
from multimodal_gen.llm.holdings import Holdings
from multimodal_gen.llm.loading import TextModel, load
from multimodal_gen.llm.runner import Runner
from multimodal_gen.llm.sampling import Sampled
from multimodal_gen.llm.scheduler import Limits, TextScheduler
from multimodal_gen.llm.sequence import Slot
from multimodal_gen.llm.sizing import settle
from multimodal_gen.llm.tokenizer import Tokenizer
from multimodal_gen.llm.writing import Writing, Written, end_ids
from multimodal_gen.lora.tree import AdaptedTree
from multimodal_gen.messages import ErrorInfo, Event, Failed, Started, TextDelta, TextFinished, TextGauges, TextStep
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.text import TextCard, TextInfo, TextRequest, TokenLogprob

NO_SICKNESS = (UserError, WeightsUnavailable)  # say nothing of the process

Done = list[tuple[Slot, Sampled]]  # what a step has computed, and chosen

log = logging.getLogger(__name__)


class TextCore:
    """One language model and everything that is asked of it."""

    def __init__(
        self,
        card: TextCard,
        config: EngineConfig,
        mesh: Mesh | None = None,
        clock: Callable[[], float] = time.monotonic,
        attempt: Attempt = attempt_alone,
        model: TextModel | None = None,
    ) -> None:
        """
        Args:
            clock: decides about deadlines and waiting.
            model: loaded already, with these settings; None: load it, or this rank's share of it.

        Raises: CorruptModel, ConfigError, PeerLost.
        """
        self.card, self.config = card, config
        self.mesh = mesh or Mesh.solo()
        self.model = model or load(card, config, self.mesh)
        page_size = config.kv_page_size
        self.room = settle(self.model, config, self.mesh)
        self.holdings = Holdings(self.room.pages, page_size, prefix_cache=config.prefix_cache)
        limits = Limits(
            self.room.step_tokens, config.max_running_requests, config.max_loras_per_batch, config.schedule_policy
        )
        self.scheduler = TextScheduler(limits, self.holdings, clock)
        self.adapters = TextAdapters(AdaptedTree(DECODER, self.model.tree), config, self.mesh.control)
        self.runner = Runner(self.model, self.adapters, self.room.pages, page_size, self.mesh.control)
        self.tokenizer = Tokenizer.load(card)
        self.detokenizer, self.matchers = Detokenizer(self.tokenizer), Matchers(self.tokenizer)
        self._attempt = attempt
        self._counts = Counts()
        self._writings: dict[str, Writing] = {}
        self._failures = 0  # requests failed in a row

    @property
    def info(self) -> TextInfo:
        """What is loaded."""
        return TextInfo(
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            backend=self.model.backend.name,
            parameters=self.card.parameters,
            context=self.room.context,
            kv_pages=self.room.pages,
            kv_page_size=self.config.kv_page_size,
            chunk_tokens=self.scheduler.limits.step_tokens,
            weight_bytes=self.model.weights.nbytes,
            kv_bytes=self.runner.kv_bytes,
        )

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do."""
        return self.scheduler.idle

    @property
    def sick(self) -> bool:
        """Whether so many requests failed in a row that the process is not to be trusted any more."""
        return self._failures >= self.config.max_consecutive_errors

    # --- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: TextRequest) -> list[Event]:
        """Queue a request; it joins at the next step."""
        try:
            if self.runner.asleep:
                raise Asleep("The model is asleep and its memory is given back; wake it first.")
            if len(request.prompt) + request.max_tokens > self.room.context:
                raise PromptTooLong(
                    f"The prompt has {len(request.prompt)} tokens and the answer may have {request.max_tokens}; "
                    f"together at most {self.room.context} fit. Shorten the prompt, or lower max_tokens."
                )
            begin = None if request.grammar is None else self.matchers.open(request.grammar)
            let_go = self.adapters.hold(request.adapter)
        except MmgenError as error:
            return [Failed(request.id, _info(error))]
        self._writings[request.id] = Writing(request, end_ids(request, self.card.eos_ids), let_go, begin)
        self.scheduler.add(request)
        return []

    def cancel(self, request_id: str) -> list[Event]:
        """Drop a request before its next step, and free its pages; an unknown id is one that has just finished."""
        if request_id not in self._writings:
            return []
        return [self._drop(request_id, Cancelled("The request was cancelled."))]

    def _drop(self, request_id: str, error: MmgenError) -> Failed:
        self.scheduler.remove(request_id, spoilt=isinstance(error, Overflowed))
        self._writings.pop(request_id).let_go()
        return Failed(request_id, _info(error))

    # --- steps ------------------------------------------------------------------------------------------------------

    def step(self) -> Iterator[Event]:
        """Run one forward of what the scheduler picks; yields what happens, as it happens.

        `Started` comes before any work on its request, so that whoever watches knows which requests a crash took down.
        """
        for request_id in self.scheduler.expired():
            yield self._drop(request_id, DeadlineExceeded("The request's deadline passed before it was finished."))
        slots = self.scheduler.plan()
        begin = time.monotonic()
        for slot in slots:
            writing = self._writings[slot.sequence.request.id]
            if writing.started is None:
                writing.started, writing.cached = begin, slot.sequence.cached
                yield Started(slot.sequence.request.id)
        events = list[Event]()
        done = self._compute(slots, events)
        self.scheduler.advance([slot for slot, _ in done])
        written = self._take(done, events)
        deltas = self._tell(written, events)
        if deltas:
            yield TextStep(deltas)
        yield from events
        self._counts.note_step(slots, time.monotonic() - begin)

    def _compute(self, slots: Sequence[Slot], events: list[Event]) -> Done:
        """Run a plan; where it fails, each sequence is tried alone, so that one cannot take others down.

        Returns what was computed, each slot with what was chosen for it: one token, or none inside a prompt.
        """
        if not slots:
            return []
        done = Done()
        error = self._attempt(f"a step of {len(slots)} texts", partial(self._run, slots, done), lockstep=True)
        if error is None:
            return done
        if isinstance(error, OutOfMemory) and len(slots) > 1:
            self._shrink(sum(slot.count for slot in slots) // 2)
        done.clear()
        for slot in slots:
            request_id = slot.sequence.request.id
            if request_id not in self._writings:  # another of its choices has failed
                continue
            if len(slots) > 1:
                what = f"a step of request {request_id}"
                error = self._attempt(what, partial(self._run, [slot], done), lockstep=True)
            if error is not None:
                self._fail(request_id, error, events)
                done = [each for each in done if each[0].sequence.request.id != request_id]
        return done

    def _run(self, slots: Sequence[Slot], done: Done) -> None:
        done += zip(slots, self.runner.run(slots, self._writings), strict=True)

    def _shrink(self, tokens: int) -> None:
        self.scheduler.limits = replace(self.scheduler.limits, step_tokens=max(1, tokens))
        log.warning("steps of text are limited to %d tokens from now on", self.scheduler.limits.step_tokens)

    # --- what follows a step ----------------------------------------------------------------------------------------

    def _take(self, done: Done, events: list[Event]) -> list[Written]:
        """Add the new tokens to their answers; those for which there is none have failed."""
        taken = list[Written]()
        for slot, sampled in done:
            writing = self._writings.get(slot.sequence.request.id)
            if not sampled.ids or writing is None:
                continue
            choice, token = writing.choices[slot.sequence.index], sampled.ids[0]
            error = sampled.errors.get(0) or attempt_alone("following an answer", partial(choice.row.accept, token))
            if error is not None:
                # A grammar that leads nowhere is its author's fault; numbers that overflow may be the model's.
                self._fail(writing.request.id, error, events, excused=not isinstance(error, Overflowed))
                taken = [each for each in taken if each.writing is not writing]
                continue
            slot.sequence.tokens.append(token)
            self._counts.note(writing)
            writing.note_token()
            taken.append(Written(writing, slot.sequence, choice, token, sampled.logprobs[0]))
        return taken

    def _tell(self, written: Sequence[Written], events: list[Event]) -> list[TextDelta]:
        """Tokens become text; answers that are complete leave."""
        pieces = list[Piece]()
        # Alike on all ranks, so there is nothing to agree about.
        error = attempt_alone("detokenising", lambda: pieces.extend(self._detokenize(written)))
        if error is not None:
            for request_id in dict.fromkeys(each.writing.request.id for each in written):
                self._fail(request_id, error, events)
            return []
        deltas = [each.delta(piece) for each, piece in zip(written, pieces, strict=True)]
        for each, delta in zip(written, deltas, strict=True):
            if delta.finish is not None and self.scheduler.finish(each.sequence):
                events.append(self._finish(each.writing))
        return deltas

    def _detokenize(self, written: Sequence[Written]) -> list[Piece]:
        return self.detokenizer.step([each.to_decode() for each in written])

    def _finish(self, writing: Writing) -> TextFinished:
        self._writings.pop(writing.request.id).let_go()
        self._failures = 0
        echo = (TokenLogprob(writing.request.prompt[0], None), *writing.echo) if writing.request.prompt_logprobs else ()
        return TextFinished(writing.request.id, writing.usage(), writing.timings(), echo)

    def _fail(self, request_id: str, error: MmgenError, events: list[Event], *, excused: bool = False) -> None:
        """End a request; `excused`: it says nothing of the process's health."""
        # Nor do numbers that overflow under adapters.
        adapter = self._writings[request_id].request.adapter
        excused |= isinstance(error, NO_SICKNESS) or (isinstance(error, Overflowed) and adapter is not None)
        self._failures += not excused
        events.append(self._drop(request_id, error))

    # --- sleep, gauges ----------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give the memory of weights, keys and values back, with nothing to do. Raises: what freeing memory raises."""
        assert self.idle, "requests are finished before the engine sleeps"
        self.holdings.tree.clear()
        self.runner.sleep()

    def wake(self) -> None:
        """Bring the weights back. Raises: CorruptModel, OutOfMemory; it may be called again then."""
        self.runner.wake()

    def gauges(self) -> TextGauges:
        """The state now, and counters since the start."""
        return self._counts.gauges(self.scheduler, self.holdings)


def _info(error: MmgenError) -> ErrorInfo:
    return ErrorInfo(error.code, error.message, error.param)
