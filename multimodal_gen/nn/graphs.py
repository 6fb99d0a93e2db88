"""Regions of a forward pass that are recorded once and replayed: on GPUs in segments between `@eager_break`s.

A region is a function of tensors whose work is the same at every call: what else it depends on is named by the caller,
and a graph is found again by the identity of it. Tensors are copied into the graph's own at every replay, so their
addresses are stable; what an `@eager_break` call returns is copied to where the next segment looks for it.

On GPUs a region's first call runs as always: kernels are compiled, buffers and handles of libraries made. The second
records it, all others replay; on a CPU (`nn.cpu_graphs`) the first does. Least recently used graphs leave.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from multimodal_gen.kernels import eager

Replay = Callable[[], None]
Compute = Callable[..., Tensor]


class Recorded(Protocol):
    """One region."""

    first: Tensor | None  # what it computed while it was recorded, where that computes
    obstacles: Sequence[str]  # what cannot be replayed: then the region runs as always

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """The region's result for these tensors, in memory that the next replay overwrites."""


class Recorder(Protocol):
    """How a device records regions: `TapeRecorder`, and `nn.cpu_graphs.CpuRecorder`."""

    most: int  # graphs that are kept
    at_once: bool  # whether a region's first call can be recorded

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        """Whether a region with such inputs is worth it."""

    def record(self, compute: Compute, inputs: Sequence[Tensor]) -> Recorded:
        """The region with tensors like `inputs`."""

    def clear(self) -> None:
        """Recordings have been forgotten."""


class Tape(Protocol):
    """What a device records; `CudaTape`, and in tests a CPU that plays back the operations of torch."""

    def begin(self) -> None:
        """What is computed from now on is recorded; whether it also happens now is the device's matter."""

    def end(self) -> Replay:
        """The segment since `begin`."""

    def lend(self, x: Tensor) -> Tensor:
        """x for later, without keeping its memory from being used by the segments that follow."""


class CudaTape:
    """CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._pool: Any = None  # as long as it has graphs; torch frees it with the last one
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream = torch.cuda.Stream(device)
        self._graph: Any = None
        self._inside: Any = None

    def begin(self) -> None:
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        # torch.cuda.graph would collect garbage and empty the allocator's cache at every segment.
        self._stream.wait_stream(torch.cuda.current_stream())
        self._graph, self._inside = torch.cuda.CUDAGraph(), torch.cuda.stream(self._stream)
        self._inside.__enter__()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graphs.add(self._graph)

    def end(self) -> Replay:
        graph, inside = self._graph, self._inside
        self._graph = self._inside = None
        try:
            graph.capture_end()
        finally:
            inside.__exit__(None, None, None)
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay

    def lend(self, x: Tensor) -> Tensor:
        flat = torch.as_tensor(_Bytes(x), device=x.device).view(x.dtype)
        return flat.as_strided(x.shape, x.stride())


class _Bytes:
    """The memory of a tensor as bytes that nobody owns (the protocol that torch reads: numba's)."""

    def __init__(self, x: Tensor) -> None:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        extent = last + 1 if x.numel() else 0
        self.__cuda_array_interface__ = {
            "shape": (extent * x.itemsize,),
            "typestr": "|u1",
            "data": (x.data_ptr(), False),
            "version": 3,
        }


class Recording:
    """One region's segments and the calls between them; `Recorded`."""

    first: Tensor | None = None
    obstacles: Sequence[str] = ()

    def __init__(self, tape: Tape, compute: Compute, inputs: Sequence[Tensor]) -> None:
        """Records `compute` of tensors like `inputs`. Nothing is left of a recording that fails."""
        self._tape = tape
        self._compute = compute  # holds what graphs read besides the inputs
        self._steps: list[Replay] = []
        self._inputs = [x.clone() for x in inputs]
        tape.begin()
        eager.recording(self)
        try:
            self._output = compute(*self._inputs)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # that nothing whole was recorded: why is on its way
                tape.end()
            raise
        finally:
            eager.recording(None)
        self._steps.append(tape.end())

    def apart(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An `@eager_break` call: the end of a segment, the call itself, the next segment."""
        self._steps.append(self._tape.end())
        eager.recording(None)
        try:
            result = function(*args, **kwargs)
        finally:
            self._tape.begin()
            eager.recording(self)
        lent = [self._lend(arg) for arg in args]
        lent_by_name = {name: self._lend(arg) for name, arg in kwargs.items()}
        if not isinstance(result, Tensor) or any(result is arg for arg in (*args, *kwargs.values())):  # in place
            self._steps.append(lambda: function(*lent, **lent_by_name))
            return result
        place = torch.empty_like(result)
        there = self._tape.lend(place)

        def call_again() -> None:
            there.copy_(function(*lent, **lent_by_name))

        self._steps.append(call_again)
        return place

    def _lend(self, arg: Any) -> Any:
        return self._tape.lend(arg) if isinstance(arg, Tensor) else arg

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """The region's result for these tensors, in memory that the next replay overwrites."""
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        for step in self._steps:
            step()
        return self._output


class TapeRecorder:
    """`Recorder` of segments between `@eager_break`s on a tape."""

    most, at_once = 16, False

    def __init__(self, tape: Tape) -> None:
        """`tape` is of all regions: they are never replayed at the same time, so they share its memory."""
        self._tape = tape

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        return True

    def record(self, compute: Compute, inputs: Sequence[Tensor]) -> Recording:
        return Recording(self._tape, compute, inputs)

    def clear(self) -> None:
        pass


@dataclass
class _Entry:
    fixed: tuple[object, ...]  # held, so that no other object gets their identity
    held: tuple[object, ...]
    recording: Recorded | None = None  # filled at the first or the second call


@dataclass
class Graphs:
    """The recorded regions of one model."""

    recorder: Recorder
    entries: OrderedDict[tuple[object, ...], _Entry] = field(default_factory=OrderedDict)
    replayed: int = 0

    def run(
        self,
        compute: Compute,
        inputs: Sequence[Tensor],
        place: tuple[int, ...],
        fixed: Sequence[object],
        held: Sequence[object] = (),
    ) -> Tensor:
        """compute(*inputs), which overwrites the first and returns it.

        Args:
            place: which region of the model it is.
            fixed: everything else that `compute` depends on; graphs hold it, and find it by identity.
            held: what `compute` reads that was made of `fixed` for this call; graphs hold it, too.
        """
        if not self.recorder.takes(inputs):
            return compute(*inputs)
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        key = (place, shapes, tuple(map(id, fixed)))
        entry = self.entries.get(key)
        if entry is None:
            entry = self.entries[key] = _Entry(tuple(fixed), tuple(held))
            while len(self.entries) > self.recorder.most:
                self.entries.popitem(last=False)
            if not self.recorder.at_once:
                return compute(*inputs)
        self.entries.move_to_end(key)
        if entry.recording is None:
            entry.held = tuple(held)  # a call before this one may have failed
            entry.recording = self.recorder.record(compute, inputs)
            if entry.recording.first is not None:
                return inputs[0].copy_(entry.recording.first)
        if entry.recording.obstacles:
            return compute(*inputs)
        self.replayed += 1
        return inputs[0].copy_(entry.recording.replay(inputs))

    def clear(self) -> None:
        """Forget all: addresses of weights are others from now on, or memory is wanted."""
        self.entries.clear()
        self.recorder.clear()
