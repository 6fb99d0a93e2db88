"""Steps of decoding recorded as CUDA graphs: a step of a small model is two hundred launches, which take ten times as
long as the work. One graph for every power of two of texts and of the longest of them; rows that are too many
write to a page that nobody has.

Only forwards of single tokens without adapters; all others, and the first two of a graph's kind, run as always.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.attention.paged import Attend
from multimodal_gen.attention.paged_triton import TritonPaged
from multimodal_gen.llm.batch import Batch
from multimodal_gen.llm.kv_cache import KVCache
from multimodal_gen.llm.models.decoder import Decoder
from multimodal_gen.nn.graphs import CudaTape, Recording, Tape

MAX_GRAPHS = 32
LEAST_TOKENS = 1024  # of the longest text that graphs are told apart by


class Recordable(Protocol):
    """Attention of single tokens that reads lengths and tables on the device."""

    def plan_decoding(self, page_table: Tensor, lengths: Tensor, longest: int, cache: Sequence[Tensor]) -> Attend:
        """int32 [B, pages], [B]; none is longer than `longest`."""


class DecodeGraphs:
    """The graphs of one model over one cache."""

    def __init__(self, decoder: Decoder, backend: Recordable, tape: Tape) -> None:
        self._decoder, self._backend, self._tape = decoder, backend, tape
        self._cache: KVCache | None = None  # that they write to; filled by the first forward over it
        self._graphs: OrderedDict[tuple[int, int], Recording | None] = OrderedDict()
        self.replayed = 0

    @classmethod
    def of(cls, decoder: Decoder, device: torch.device) -> DecodeGraphs | None:
        """Where the model's attention can be recorded."""
        backend = decoder.backend
        return cls(decoder, backend, CudaTape(device)) if isinstance(backend, TritonPaged) else None

    def clear(self) -> None:
        """Weights or cache go away."""
        self._graphs.clear()
        self._cache = None

    def run(self, batch: Batch, cache: KVCache) -> Tensor | None:
        """Logits of a batch as of `Decoder.forward`, in memory that the next call overwrites; None: not by graphs."""
        if batch.routing is not None or not _single(batch):
            return None
        if self._cache is not cache:
            self.clear()
            self._cache = cache
        rows = _power(batch.tokens)
        longest = max(LEAST_TOKENS, _power(max(span.stop for span in batch.spans)))
        key = (rows, longest)
        inputs = _padded(batch, cache, rows, longest)
        if key not in self._graphs:
            self._graphs[key] = None
            while len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
            return self._compute(inputs, longest)[: batch.tokens]
        self._graphs.move_to_end(key)
        recording = self._graphs[key]
        if recording is None:
            recording = self._graphs[key] = Recording(self._tape, lambda *own: self._compute(own, longest), inputs)
        self.replayed += 1
        return recording.replay(inputs)[: batch.tokens]

    def _compute(self, inputs: Sequence[Tensor], longest: int) -> Tensor:
        ids, positions, slots, table, lengths = inputs
        cache = self._cache
        assert cache is not None, "run() comes first"
        attend = self._backend.plan_decoding(table, lengths, longest, cache.layers)
        return self._decoder.decode(Batch((), cache.page_size, ids, positions, slots, positions), attend, cache)


def _single(batch: Batch) -> bool:
    return all(len(span.ids) == 1 for span in batch.spans) and len(batch.logits_at) == batch.tokens


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _padded(batch: Batch, cache: KVCache, rows: int, longest: int) -> list[Tensor]:
    """ids, positions, slots [rows]; the table of pages [rows, pages of `longest`]; lengths [rows]."""
    more, spare = rows - batch.tokens, cache.spare
    width = -(-longest // batch.page_size)
    table = F.pad(batch.page_table, (0, width - batch.page_table.shape[1], 0, more), value=spare)
    return [
        F.pad(batch.ids, (0, more)),
        F.pad(batch.positions, (0, more)),
        F.pad(batch.slots, (0, more), value=spare * batch.page_size),
        table,
        F.pad(batch.lengths, (0, more), value=1),
    ]
