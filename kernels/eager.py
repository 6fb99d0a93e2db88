"""`@eager_break`: calls that a compiler does not look into and that, most of them, no graph of a GPU holds.

Collectives, adapters that differ per token, code of our own compiler, and whatever looks at numbers. Nothing else
breaks a compiled or recorded region: tests count the breaks. Without either, a call costs two more Python calls.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Interrupted(Protocol):
    """Something that records work and lets calls happen between two pieces of it (`nn.graphs.Recording`)."""

    def apart(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call now, outside of what is recorded, and at every replay."""


class _Point:
    """One decorated function."""

    def __init__(self, function: Callable[..., Any], recorded: bool) -> None:
        self.name = f"{function.__module__}.{function.__qualname__}"
        self._function, self._recorded = function, recorded
        self.function = self._call  # as `tell_compiler` left it

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if _here.recording is None or self._recorded:
            return self._function(*args, **kwargs)
        return _here.recording.apart(self._function, args, kwargs)


class _Here(threading.local):
    """Of this thread: engines of one process may compute at the same time."""

    recording: Interrupted | None = None


_here = _Here()
_points: list[_Point] = []


def recording(what: Interrupted | None) -> None:
    """From now on calls interrupt this recording; None: there is none."""
    assert what is None or _here.recording is None, "one recording at a time"
    _here.recording = what


@overload
def eager_break(function: Callable[P, R]) -> Callable[P, R]: ...
@overload
def eager_break(*, recorded: bool) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def eager_break(function: Callable[P, R] | None = None, *, recorded: bool = False) -> Any:
    """Decorates functions and methods.

    Args:
        recorded: True: a compiler leaves it alone, and graphs hold it: its work on the device is the same at every
            call with tensors of these shapes, and what it keeps is there from the first call on.
    """
    if function is None:
        return functools.partial(eager_break, recorded=recorded)
    point = _Point(function, recorded)
    _points.append(point)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return cast("R", point.function(*args, **kwargs))

    return call


def tell_compiler() -> None:
    """Have torch.compile leave alone what is decorated, as far as it is imported; imports the compiler.

    Not at decoration: torch's compiler takes seconds to import, and most processes never compile.
    """
    for point in _points:
        point.function = torch.compiler.disable(point.function, reason=f"@eager_break {point.name}")
