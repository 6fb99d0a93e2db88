"""A CPU that plays back what torch did: operations run when they are recorded, and again at every replay, into the same
memory. So whatever a graph would read at an address that is not its own comes out wrong here, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAKES_MEMORY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] not in MAKES_MEMORY:
            self.done.append((func, args, kwargs or {}, result))
        return result


class PlayedBack:
    """`nn.graphs.Tape` without a GPU."""

    def __init__(self) -> None:
        self.segments = 0
        self._recorder: _Recorder | None = None

    def begin(self) -> None:
        self._recorder = _Recorder()
        self._recorder.__enter__()

    def end(self) -> Callable[[], None]:
        assert self._recorder is not None
        recorder, self._recorder = self._recorder, None
        recorder.__exit__(None, None, None)
        self.segments += 1
        return lambda: _play(recorder.done)

    def lend(self, x: Tensor) -> Tensor:
        return x.detach()


def _play(done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
    with torch.inference_mode():
        for func, args, kwargs, result in done:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
