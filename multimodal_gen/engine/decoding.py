"""Rows whose steps are done, while they become pixels: piece by piece, between the denoising steps of others.

Pure of torch and of clocks of its own, so that all ranks decide alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from multimodal_gen.media.arrays import from_numpy
from multimodal_gen.messages import Array, Frames
from multimodal_gen.pipelines.contract import Row, whole
from multimodal_gen.request import VideoRequest

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Decode:
    """One row on its way to pixels."""

    row: Row  # filled by the engine
    pieces: Iterator[np.ndarray | None]  # filled by the engine: what the pipeline still makes
    kept: list[np.ndarray] = field(default_factory=list)  # so far; nothing where frames leave as they are made
    frames: int = 0  # made so far; a picture counts as one

    @property
    def expected(self) -> int:
        """Frames in the end."""
        request = self.row.request
        return request.num_frames if isinstance(request, VideoRequest) else 1

    @property
    def done(self) -> bool:
        """Whether all is made."""
        return self.frames == self.expected

    @property
    def leaves(self) -> bool:
        """Whether frames leave as they are made."""
        request = self.row.request
        return isinstance(request, VideoRequest) and request.stream_frames

    def advance(self, merged: tuple[str, ...]) -> Frames | None:
        """Make the next piece; the frames that leave now, if any do. Raises: what the pipeline raises."""
        made = next(self.pieces)
        if made is None:
            return None
        begin = self.frames
        self.frames += len(made) if made.ndim == 4 else 1
        assert self.frames <= self.expected, (self.frames, self.expected)
        if not self.leaves:
            self.kept.append(made)
            return None
        return Frames(self.row.request.id, self.row.index, begin, from_numpy(made), merged)

    @property
    def output(self) -> Array:
        """All that was kept."""
        return from_numpy(whole(self.kept))


@dataclass
class Decoding:
    """All of them, in the order in which their steps were done, and whose turn it is: theirs or a denoising step's.

    Where both wait, decoding takes as long as the last step has taken, then a step comes. So neither waits longer than
    the other needs, and whoever decodes quickly is done at once. Steps of text in between are time of neither.
    """

    waiting: list[Decode] = field(default_factory=list)
    _stepped: float | None = None  # when the last step began, while it is not known how long it has taken
    _step_s: float = 0.0  # of the last step
    _began: float | None = None  # when decoding took its turn, where a step waits since

    def due(self, now: float, *, steps: bool) -> bool:
        """Whether a piece is next; `now` is the time of this turn, `steps` whether rows wait for a denoising step."""
        if self._stepped is not None:
            self._step_s, self._stepped = now - self._stepped, None
        if not self.waiting:
            self._began = None
        if not self.waiting or not steps:
            return bool(self.waiting)
        if self._began is None:
            self._began = now
        if now - self._began <= self._step_s:
            return True
        self._began = None
        return False

    def step(self, now: float) -> None:
        """A denoising step begins."""
        self._stepped = now

    def others_took(self, seconds: float) -> None:
        """Steps of text came between two turns of pictures."""
        self._stepped = None if self._stepped is None else self._stepped + seconds
        self._began = None if self._began is None else self._began + seconds

    def drop(self, request_id: str) -> None:
        """Forget the rows of a request."""
        self.waiting = [each for each in self.waiting if each.row.request.id != request_id]
