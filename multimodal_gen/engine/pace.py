"""A GPU's host must not run ahead of it: a whole request is launched in the time of a few steps.

Then nobody could cancel it, progress would be told before it was made, and the times of steps would be those of their
launches. One step ahead is enough to keep the GPU busy.
"""

from __future__ import annotations

import torch


class Pace:
    """Of one engine; nothing on a CPU."""

    def __init__(self, device: str) -> None:
        """`device`: as `PipelineInfo` names it."""
        self._device = torch.device(device)
        self._last: torch.cuda.Event | None = None  # after the step before

    def after_step(self) -> None:
        """Return once the step before the one that was just launched is done."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)  # whoever waits sleeps
        event.record(torch.cuda.current_stream(self._device))
        if self._last is not None:
            self._last.synchronize()
        self._last = event
