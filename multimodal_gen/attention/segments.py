"""The shape of a packed batch: sequences of different lengths laid end to end in one [T, ...] tensor."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.kernels.eager import eager_break


@dataclass(frozen=True)
class Run:
    """Neighbouring segments of one length: they can be viewed as a dense batch."""

    first: int  # index of the first segment
    last: int  # one past the last segment
    start: int  # first token
    length: int  # tokens per segment

    @property
    def count(self) -> int:
        """Number of segments."""
        return self.last - self.first

    def tokens(self, x: Tensor) -> Tensor:
        """View of x [T, ...] as [count, length, ...]."""
        stop = self.start + self.count * self.length
        return x[self.start : stop].unflatten(0, (self.count, self.length))


def paired_runs(queries: Segments, keys: Segments) -> Iterator[tuple[Run, Run]]:
    """Runs of neighbouring segments that have one length on each side."""
    first = start = key_start = 0
    for (length, key_length), group in groupby(zip(queries.lengths, keys.lengths, strict=True)):
        last = first + len(list(group))
        yield Run(first, last, start, length), Run(first, last, key_start, key_length)
        start, key_start = start + (last - first) * length, key_start + (last - first) * key_length
        first = last


@dataclass(frozen=True)
class Segments:
    """Lengths of the packed sequences in order. Sort by length before packing: fewer runs, fewer launches."""

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """Segments with these lengths."""
        return cls(tuple(lengths))

    @cached_property
    def total(self) -> int:
        """Number of tokens."""
        return sum(self.lengths)

    def within(self, start: int, stop: int) -> list[int]:
        """How many tokens of each segment lie in [start, stop)."""
        found, first = [], 0
        for length in self.lengths:
            found.append(max(0, min(first + length, stop) - max(first, start)))
            first += length
        return found

    @eager_break(recorded=True)
    def index(self, device: torch.device) -> Tensor:
        """int32 [T]: the segment of each token. Recorded graphs read it: whoever records holds the segments."""
        found = self._indices.get(device)
        if found is None:
            found = self._indices[device] = _index(self.lengths, device)
        return found

    @cached_property
    def _indices(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The segments as maximal runs of equal length."""
        runs, first, start = [], 0, 0
        for length, group in groupby(self.lengths):
            count = len(list(group))
            runs.append(Run(first, first + count, start, length))
            first, start = first + count, start + count * length
        return tuple(runs)


# Segments of the same lengths are made at every step, and a copy to a GPU waits until it has done all that came before.
@functools.lru_cache(maxsize=64)
def _index(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    # numpy's takes a tenth of the time of torch's
    owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return torch.from_numpy(owners).to(device)
