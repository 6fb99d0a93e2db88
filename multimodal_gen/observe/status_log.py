"""What a scheduler tells of itself from time to time: the ids of what runs and what waits, as lines of JSON.

A line is worth less than a step. The scheduler only puts it into a short queue; a thread writes it, to a pipe that may
be full or a disk that may hang, and what finds no room in the queue is dropped and counted. That lines cannot be
written is told once in the log, and once more that they can be again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import msgspec

KEPT_FILES = 48  # hours of one scheduler that stay in a folder
QUEUE_LINES = 64
CLOSE_SECONDS = 1.0

log = logging.getLogger(__name__)


class Standing(msgspec.Struct, frozen=True):
    """What one side of an engine has in its hands."""

    side: str
    """text, or pictures (videos are among them)"""
    running: tuple[str, ...] = ()
    """ids of requests that have been started"""
    queued: tuple[str, ...] = ()


class StatusLine(msgspec.Struct, frozen=True):
    """One line of the log."""

    time: str
    """UTC, ISO 8601"""
    replica: int
    rank: int
    side: str
    running: tuple[str, ...]
    queued: tuple[str, ...]
    dropped: int
    """lines that were lost before this one"""


class Target(Protocol):
    """Where lines go."""

    def write(self, line: bytes) -> None:
        """Raises: OSError, RuntimeError."""


class Stdout:
    """This process's standard output, past Python's buffers."""

    def write(self, line: bytes) -> None:
        """Raises: OSError."""
        _write_all(1, line)


class Folder:
    """A folder with a file for every hour (UTC) and scheduler, of which the last KEPT_FILES stay.

    The file is opened for each line: whatever happens to the folder meanwhile, the next line does what can be done.
    """

    def __init__(self, path: str, name: str, clock: Callable[[], float] = time.time) -> None:
        """`name` begins the names of the files; the clock tells seconds since the epoch."""
        self._path = path
        self._name = name
        self._clock = clock
        self._torn = False  # half a line may be at the end

    def write(self, line: bytes) -> None:
        """Raises: OSError; RuntimeError for the home of nobody."""
        folder = Path(self._path).expanduser()
        hour = time.strftime("%Y-%m-%dT%H", time.gmtime(self._clock()))
        file = folder / f"{self._name}.{hour}.jsonl"
        is_new = not file.exists()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            was_torn, self._torn = self._torn, True
            _write_all(descriptor, b"\n" + line if was_torn else line)
            self._torn = False
        finally:
            os.close(descriptor)
        if is_new:
            self._forget_old(folder)

    def _forget_old(self, folder: Path) -> None:
        files = sorted(folder.glob(f"{self._name}.????-??-??T??.jsonl"))
        for old in files[:-KEPT_FILES]:
            old.unlink(missing_ok=True)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class _Writer:
    """The thread behind a target."""

    def __init__(self, target: Target) -> None:
        self.dropped = 0  # since the last line that found room
        self._target = target
        self._lines: queue.Queue[bytes | None] = queue.Queue(QUEUE_LINES)
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="status log", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        try:
            self._lines.put_nowait(line)
            self.dropped = 0
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Wait a moment for what is left, and no longer."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._target.write(line)
            except (OSError, RuntimeError, ValueError) as error:
                if not self._failing:
                    log.warning("the scheduler's status cannot be written (%s); it goes on without", error)
                self._failing = True
            else:
                if self._failing:
                    log.warning("the scheduler's status is written again")
                self._failing = False


class StatusLog:
    """The lines of one scheduler, which calls `note` every turn."""

    def __init__(
        self,
        target: Target,
        interval_s: float,
        replica: int = 0,
        rank: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the writing thread."""
        self._writer = _Writer(target)
        self._interval_s = interval_s
        self._replica = replica
        self._rank = rank
        self._clock = clock
        self._next = clock() + interval_s
        self._told_busy = False

    def note(self, idle: bool, look: Callable[[], Iterable[Standing]]) -> None:
        """Write when it is time: every interval while there is work, and once when there is none any more, so that the
        last line is never stale. `look` is called only then."""
        now = self._clock()
        if now < self._next and not (idle and self._told_busy):
            return
        self._next, self._told_busy = now + self._interval_s, not idle
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for side in look():
            line = StatusLine(
                stamp, self._replica, self._rank, side.side, side.running, side.queued, self._writer.dropped
            )
            self._writer.put(msgspec.json.encode(line) + b"\n")

    def close(self) -> None:
        """Nothing is noted any more; waits at most two moments for lines that are under way."""
        self._writer.close()


def open_status_log(target: str | None, interval_s: float, replica: int, rank: int) -> StatusLog | None:
    """The log that the settings ask for: `stdout`, or a folder."""
    if target is None:
        return None
    name = f"scheduler-{replica}-{rank}"
    return StatusLog(Stdout() if target == "stdout" else Folder(target, name), interval_s, replica, rank)
