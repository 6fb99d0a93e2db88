"""One image of a diffusers pipeline, a step at a time.

diffusers has its denoising loop inside `__call__`, and the engine wants to own the loop. So the call runs in a thread
of its own that stops after every step until it is told to go on. Only one of the two threads runs at any moment.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Step = Callable[..., Any]


class _Stop(BaseException):
    """Unwinds the pipeline's call; no BaseException of a user, so that no `except Exception` on the way catches it."""


@dataclass(frozen=True)
class _StepDone:
    total: int  # steps that this run will have in all


@dataclass(frozen=True)
class _Returned:
    output: Any


@dataclass(frozen=True)
class _Raised:
    error: BaseException


class StepwiseCall:
    """A pipeline call that `advance` and `finish` drive and `cancel` ends.

    `call(on_step)` runs the pipeline, which calls `on_step` after each of its steps; from then on `count_steps()` says
    how many there are in all.
    """

    def __init__(self, call: Callable[[Step], Any], count_steps: Callable[[], int]) -> None:
        self._call = call
        self._count_steps = count_steps
        self._orders: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: go on; False: stop
        self._reports: queue.SimpleQueue[_StepDone | _Returned | _Raised] = queue.SimpleQueue()
        self._done = 0
        self._total: int | None = None
        self._returned: _Returned | None = None
        self._raised: _Raised | None = None
        self._thread = threading.Thread(target=self._main, name="diffusers-call", daemon=True)
        self._thread.start()

    def advance(self, share: int, of: int) -> None:
        """Run until `share / of` of the pipeline's own steps are done; raises what the pipeline raised.

        Solvers of higher order take more steps than were asked for, few-step ones fewer: `of` requested steps are
        spread evenly over them.
        """
        while self._returned is None and (self._total is None or self._done < self._total * share // of):
            self._go_on()

    def finish(self) -> Any:
        """Run to the end and return the call's value; raises what the pipeline raised."""
        while self._returned is None:
            self._go_on()
        self._thread.join()
        return self._returned.output

    def cancel(self) -> None:
        """End the thread; it has let go of its tensors when this returns. Safe after the end and after an error."""
        self._orders.put(False)
        self._thread.join()

    def _go_on(self) -> None:
        if self._raised is not None:
            raise self._raised.error
        self._orders.put(True)
        report = self._reports.get()
        if isinstance(report, _Raised):
            self._raised = report
            self._thread.join()
            raise report.error
        if isinstance(report, _Returned):
            self._returned = report
        else:
            self._done += 1
            self._total = report.total

    def _main(self) -> None:
        try:
            self._wait()
            self._reports.put(_Returned(self._call(self._on_step)))
        except _Stop:
            return
        except BaseException as error:  # noqa: BLE001 - carried to the thread that drives this one
            self._reports.put(_Raised(error))

    def _on_step(self, *arguments: Any) -> Any:
        self._reports.put(_StepDone(self._count_steps()))
        self._wait()
        # (pipeline, step, timestep, tensors) wants the tensors back; the old (step, timestep, latents) wants nothing.
        return arguments[3] if len(arguments) == 4 else None

    def _wait(self) -> None:
        if not self._orders.get():
            raise _Stop
