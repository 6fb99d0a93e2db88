"""Regions of small work on a CPU, recorded once and replayed as one call of our own kernels (`kernels/replay.py`).

What a region computes with is known from the first time on: weights and tables stay where they are, inputs are copied
to where they were, and memory in between is lent by a pool while it is recorded, so that a replay writes to addresses
that nobody else uses. All of a region must be calls of such kernels and views: whatever else is met while recording (an
operation of torch, a collective, an adapter) means that it runs as always, then and later.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from multimodal_gen.kernels import eager, replay
from multimodal_gen.nn.graphs import Compute

LARGEST = 4 << 20  # bytes of inputs: above it the calls themselves take all of the time
SMALLEST = 1 << 12  # bytes of memory


class Pool:
    """Memory of recordings, which never run at the same time: what one has let go of, the next may have.

    Sizes are powers of two, and something larger will do: all recordings together hold at most four times what the one
    that needs most does.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._all: list[Tensor] = []  # held: recordings know addresses

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(memory.nbytes for memory in self._all)

    def lend(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] that comes back when nothing refers to it any more, views included."""
        memory = self.take(nbytes)
        array = memory.numpy()[:nbytes]  # the storage of the tensor below holds it, and nothing else does
        weakref.finalize(array, self.give_back, memory)
        return torch.from_numpy(array)

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes or more] that is given back by `give_back`."""
        fit = [memory for memory in self._free if memory.nbytes >= nbytes]
        if not fit:
            return self._new(nbytes)
        memory = min(reversed(fit), key=lambda memory: memory.nbytes)  # the last that came back is in the cache
        self._free = [other for other in self._free if other is not memory]
        return memory

    def give_back(self, memory: Tensor) -> None:
        """The next may have it."""
        self._free.append(memory)

    def _new(self, nbytes: int) -> Tensor:
        made = torch.empty(max(SMALLEST, 1 << (nbytes - 1).bit_length()), dtype=torch.uint8, device="cpu")
        self._all.append(made)
        return made


class _Watch(TorchDispatchMode):
    """Lends memory for new tensors, lets views pass, and takes down everything else."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.others: list[str] = []  # operations that are no views
        self._pool = pool

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import its compiler, a second's work, to keep it away from here. Nothing is compiled inside."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in MAKES_MEMORY:
            return self._lend(result)
        if func._schema.is_mutable or not _is_view(result, args):
            self.others.append(func.name())
        return result

    def _lend(self, like: Tensor) -> Tensor:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        return _like(like, self._pool.lend(extent * like.itemsize if like.numel() else 0))


def _like(x: Tensor, memory: Tensor) -> Tensor:
    return memory.view(x.dtype).as_strided(x.shape, x.stride())


MAKES_MEMORY = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}


def _is_view(result: Any, args: Sequence[Any]) -> bool:
    mine = {_memory(x) for x in args if isinstance(x, Tensor)}
    made = result if isinstance(result, list | tuple) else [result]
    return all(isinstance(x, Tensor) and _memory(x) in mine for x in made)


def _memory(x: Tensor) -> int:
    """Where it begins; 0 of what is packed for oneDNN."""
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else 0


class CpuRecording:
    """One region; `nn.graphs.Recorded`."""

    def __init__(self, pool: Pool, compute: Compute, inputs: Sequence[Tensor]) -> None:
        """Computes while it records. What calls read is the model's, or held by `nn.graphs.Graphs` for the caller: not
        `compute` itself, because that holds the model, which holds its graphs."""
        self._pool = pool
        places = [pool.take(x.nbytes) for x in inputs]
        self._inputs = [_like(x, place).copy_(x) for x, place in zip(inputs, places, strict=True)]
        self._calls, self._watch = replay.Recording(), _Watch(pool)
        eager.recording(self)
        try:
            with self._calls.listening(), self._watch:
                self._output = compute(*self._inputs)
        finally:
            eager.recording(None)
            for place in places:  # not used again while this recording runs, but free for others
                pool.give_back(place)
        self.first: Tensor | None = self._output
        self.obstacles: Sequence[str] = [*self._watch.others, *self._calls.unknown]
        self._replay = None if self.obstacles else self._calls.finish()

    def apart(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`eager.Interrupted`: calls of our kernels are recorded like others; what makes none must not be left out."""
        before = len(self._calls)
        result = function(*args, **kwargs)
        if len(self._calls) == before:
            self._watch.others.append(function.__qualname__)
        return result

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """The region's result for these tensors, in memory that the next replay overwrites."""
        assert self._replay is not None, self.obstacles
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        self._replay()
        return self._output


class CpuRecorder:
    """`nn.graphs.Recorder`."""

    most, at_once = 256, True

    def __init__(self) -> None:
        self._pool = Pool()

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        """Whether there is something to win."""
        return sum(x.nbytes for x in inputs) <= LARGEST

    def record(self, compute: Compute, inputs: Sequence[Tensor]) -> CpuRecording:
        """The region with tensors like `inputs`."""
        return CpuRecording(self._pool, compute, inputs)

    def clear(self) -> None:
        """Recordings are forgotten; their memory goes with the last of them."""
        self._pool = Pool()
