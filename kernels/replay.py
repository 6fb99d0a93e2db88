"""Calls of compiled kernels, recorded once and then made again as one call, by threads that stay together.

Pictures of 128 pixels pass a block of ten calls in 0.5 ms, and Python would take a quarter of that again: for views,
checks, memory, and for waking threads ten times. A recording holds the arguments as numbers; whoever records sees to it
that what they point to stays where it is (`nn.cpu_graphs`). Every function that can be replayed says so in C++
(`REPLAYED` in cpu/replay.hpp); results are those of the calls themselves, bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from multimodal_gen.kernels import native


class _Slot(ctypes.Union):
    """`Slot` of cpu/replay.hpp."""

    _fields_ = (("pointer", ctypes.c_void_p), ("whole", ctypes.c_int64), ("real", ctypes.c_double))


class _Call(ctypes.Structure):
    """`Recorded` of cpu/replay.cpp."""

    _fields_ = (("function", ctypes.c_void_p), ("slots", ctypes.c_void_p))


FIELDS = {"p": "pointer", "i": "whole", "f": "real", "d": "real"}  # by the kind of an argument (native.Function)


class Recording:
    """The calls since it was made; filled while it is `listening`."""

    def __init__(self) -> None:
        self.unknown: list[str] = []  # functions that cannot be replayed
        self._calls: list[_Call] = []
        self._held: list[object] = []
        self._checks: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._calls)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Calls are made, and recorded, inside."""
        native.listen(self)
        try:
            yield
        finally:
            native.listen(None)

    def over(self, name: str, kinds: str, compute: native.CFunction, entry: int | None) -> native.CFunction:
        """`native.Listener`: `compute`, recorded. `entry`: where its variant for slots stands."""
        if entry is None:
            self.unknown.append(name)
            return compute

        def call(*args: Any) -> None:
            compute(*args)
            numbers = map(self._number, args)
            slots = (_Slot * len(args))(*(_Slot(**{FIELDS[k]: n}) for k, n in zip(kinds, numbers, strict=True)))
            self._held.append(slots)
            self._calls.append(_Call(entry, ctypes.addressof(slots)))

        return call

    def _number(self, arg: Any) -> Any:
        """What C gets; structures that are pointed to are held."""
        if arg is None or isinstance(arg, int | float):
            return arg
        self._held.append(arg)
        return ctypes.addressof(arg._obj)  # of ctypes.byref

    def hold(self, thing: object) -> None:
        """`native.Listener`."""
        self._held.append(thing)

    def check(self, look: Callable[[], None]) -> None:
        """`native.Listener`."""
        self._checks.append(look)

    def finish(self) -> Callable[[], None]:
        """All calls as one. Raises what checks raise."""
        assert not self.unknown, self.unknown
        library = native.library()
        assert library is not None, "there were calls of it"
        calls = (_Call * len(self))(*self._calls)
        together, count = library.replay, ctypes.c_int64(len(self))
        together.restype = None
        first = ctypes.byref(calls)

        def replay() -> None:
            together(first, count)
            for look in self._checks:
                look()

        return replay
