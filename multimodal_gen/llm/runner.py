"""One forward: from a plan to what was chosen for each of its sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from multimodal_gen.errors import Overflowed
from multimodal_gen.llm.adapters import TextAdapters
from multimodal_gen.llm.batch import Batch, Span
from multimodal_gen.llm.kv_cache import KVCache
from multimodal_gen.llm.loading import TextModel
from multimodal_gen.llm.logprobs import tell
from multimodal_gen.llm.sampler import Sampled, Sampler
from multimodal_gen.llm.sequence import Slot
from multimodal_gen.llm.writing import Writing
from multimodal_gen.memory.free import Promise
from multimodal_gen.parallel.group import Group


class Runner:
    """The model with its keys and values, adapters and sampler."""

    def __init__(self, model: TextModel, adapters: TextAdapters, pages: int, page_size: int, ranks: Group) -> None:
        """`ranks`: all of the replica; each runs the same plans."""
        self.model, self.adapters = model, adapters
        self.kv_bytes = pages * model.page_bytes(page_size)
        self._pages, self._page_size, self._ranks = pages, page_size, ranks
        self._sampler = Sampler()
        self._cache: KVCache | None = None
        self._promise: Promise | None = None  # of what pages and their copies will come to
        self._open()

    def _open(self) -> None:
        self._cache = self.model.new_cache(self._pages, self._page_size)
        promised = self.kv_bytes * (1 + self.model.backend.copies)
        self._promise = Promise(promised) if self.model.device.type == "cpu" else None

    @property
    def asleep(self) -> bool:
        """Whether weights, keys and values are gone."""
        return self._cache is None

    @torch.inference_mode()
    def run(self, slots: Sequence[Slot], writings: Mapping[str, Writing]) -> list[Sampled]:
        """What was chosen for each slot: one token, or none inside a prompt. Nothing else has changed by then, but for
        keys and values, and what the writings know of their prompts' tokens.

        Raises: whatever the model or its adapters raise; PeerLost.
        """
        # Kernels in Triton start on the current device, which in a program of somebody else's may be another.
        on_cuda = self.model.device.type == "cuda"
        with torch.cuda.device(self.model.device) if on_cuda else contextlib.nullcontext():
            return self._run(slots, writings)

    def _run(self, slots: Sequence[Slot], writings: Mapping[str, Writing]) -> list[Sampled]:
        assert self._cache is not None, "nothing runs while the model sleeps"
        order = _side_by_side(slots)
        planned = [slots[at] for at in order]
        spans = [_span(slot) for slot in planned]
        adapters = [slot.sequence.request.adapter for slot in planned]
        routing = self.adapters.routing([slot.count for slot in planned], adapters)
        batch = Batch.of(spans, self._page_size, self.model.device, routing)
        logits = self.model.forward(batch, self._cache)
        rows, first = list[int](), 0
        for slot in planned:
            _echo(slot, writings[slot.sequence.request.id], logits[first : first + slot.logits])
            first += slot.logits
            if slot.completes:
                rows.append(first - 1)
        chosen = self._choose(logits, rows, [slot for slot in planned if slot.completes], writings)
        results = [Sampled([], [], {}) for _ in slots]
        for at in order:
            if slots[at].completes:
                results[at] = chosen.pop(0)
        return results

    def _choose(
        self, logits: Tensor, rows: list[int], slots: Sequence[Slot], writings: Mapping[str, Writing]
    ) -> list[Sampled]:
        """A token for each of these slots, whose logits are in these rows."""
        if not slots:
            return []
        answers = [writings[slot.sequence.request.id].choice(slot.sequence.index).row for slot in slots]
        wanted = logits if len(rows) == len(logits) else logits[rows]
        sampled = self._agree(self._sampler.sample(wanted, answers))
        return [
            Sampled([token], [thought], {0: sampled.errors[at]} if at in sampled.errors else {})
            for at, (token, thought) in enumerate(zip(sampled.ids, sampled.logprobs, strict=True))
        ]

    def _agree(self, sampled: Sampled) -> Sampled:
        """What rank 0 has chosen, on all ranks: rounding may differ between them. Raises: PeerLost."""
        if self._ranks.size == 1:
            return sampled
        ids = self._ranks.broadcast_(torch.tensor(sampled.ids), 0).tolist()
        unknown = Overflowed("The model's numbers overflowed on another rank.")
        return Sampled(
            ids, sampled.logprobs, {at: sampled.errors.get(at, unknown) for at, token in enumerate(ids) if token < 0}
        )

    def sleep(self) -> None:
        """Give the memory of weights, keys and values back."""
        self._cache = self._promise = None
        self.adapters.forget_overlays()
        self.model.sleep()

    def wake(self) -> None:
        """Have it again. Raises: CorruptModel."""
        self.model.wake()
        self._open()


def _side_by_side(slots: Sequence[Slot]) -> list[int]:
    """Places of slots: single tokens first, and those with one adapter together."""
    adapters = list(dict.fromkeys(slot.sequence.request.adapter for slot in slots))
    return sorted(range(len(slots)), key=lambda at: _place(slots[at], adapters))


def _place(slot: Slot, adapters: list[str | None]) -> tuple[bool, int]:
    longer, adapter = slot.count > 1, adapters.index(slot.sequence.request.adapter)
    # The last adapter of the single tokens is the first of the longer spans.
    return longer, -adapter if longer else adapter


def _span(slot: Slot) -> Span:
    sequence = slot.sequence
    return Span(slot.ids, sequence.computed, sequence.pages, slot.logits, sequence.number)


def _echo(slot: Slot, writing: Writing, logits: Tensor) -> None:
    """What the model thinks of the prompt's tokens that follow these rows."""
    request, first = slot.sequence.request, slot.sequence.computed
    if not request.prompt_logprobs or slot.sequence.index or slot.sequence.generated:
        return
    following = request.prompt[first + 1 : first + 1 + slot.count]
    # A step that is done again tells again.
    writing.echo[first:] = tell(logits[: len(following)], following, request.logprobs or 0)
