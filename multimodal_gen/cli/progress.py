"""The progress bar of `mmgen generate`: steps done, seconds per step, time left."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

from multimodal_gen.messages import Progress

_FORMAT = "{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"


class StepBar:
    """Counts one step for each image that takes one; on stderr, where a terminal or a log shows it."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        # A log file wants a line now and then, not ten a second.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=total, disable=quiet, file=sys.stderr, bar_format=_FORMAT, unit="step", mininterval=interval
        )

    def update(self, _progress: Progress) -> None:
        """Called by the engine after each step of each image."""
        self._bar.update(1)

    def __enter__(self) -> StepBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
