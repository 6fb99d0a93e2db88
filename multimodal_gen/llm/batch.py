"""What one forward of a language model computes: spans of several sequences, laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from multimodal_gen.nn.lowrank import Routed


@dataclass(frozen=True)
class Span:
    """Tokens [start, start + len(ids)) of one sequence: one token in decoding, a chunk of the prompt in prefill."""

    ids: Sequence[int]
    start: int  # tokens of the sequence whose KV is there already
    pages: Sequence[int]  # of the KV cache, in order; they hold start + len(ids) tokens at least
    logits: int = 1  # of how many of its last tokens logits are wanted: 0 inside a prompt, 1 at its end, more for echo
    owner: int | None = None  # a number of the sequence's own; None: nothing is remembered of it between forwards

    @property
    def stop(self) -> int:
        """Tokens of the sequence whose KV is there afterwards."""
        return self.start + len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Spans as tensors. T tokens, B spans, R wanted rows of logits."""

    spans: tuple[Span, ...]
    page_size: int
    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]: page · page_size + offset, where each token's KV goes
    logits_at: Tensor  # int64 [R]
    routing: Routed | None = None  # adapters of the tokens

    @classmethod
    def of(cls, spans: Sequence[Span], page_size: int, device: torch.device, routing: Routed | None = None) -> Batch:
        """Lay spans out on a device, in their order."""
        ids, positions, slots, wanted = list[int](), list[int](), list[int](), list[int]()
        for span in spans:
            ids += span.ids
            positions += range(span.start, span.stop)
            slots += [span.pages[at // page_size] * page_size + at % page_size for at in range(span.start, span.stop)]
            wanted += range(len(ids) - span.logits, len(ids))

        def on_device(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long).to(device)

        return cls(
            tuple(spans), page_size, on_device(ids), on_device(positions), on_device(slots), on_device(wanted), routing
        )

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids)

    @cached_property
    def slots_at(self) -> tuple[Tensor, Tensor]:
        """Page and offset of each slot, int64 [T] each."""
        return self.slots // self.page_size, self.slots % self.page_size

    @cached_property
    def page_table(self) -> Tensor:
        """int32 [B, pages of the longest span]; zeros where a sequence has fewer."""
        width = max(-(-span.stop // self.page_size) for span in self.spans)
        rows = [list(span.pages[: -(-span.stop // self.page_size)]) for span in self.spans]
        padded = [row + [0] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int32).to(self.ids.device)

    @cached_property
    def lengths(self) -> Tensor:
        """int32 [B]: tokens of each sequence, those of this forward included."""
        return torch.tensor([span.stop for span in self.spans], dtype=torch.int32).to(self.ids.device)
