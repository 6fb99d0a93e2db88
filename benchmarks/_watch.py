"""Memory of another process, sampled while it works.

anon  anonymous memory: what the kernel cannot drop (there is no swap). RssAnon of /proc/PID/status, every few ms.
file  mapped pages of files, which the kernel may drop and must read again then; each counted by its share of users.
pss   both, and shared memory: the proportional set size. `file` and `pss` come from /proc/PID/smaps_rollup, which the
      kernel has to walk all pages for: less often.

Files that are read, not mapped, are nobody's memory: their pages are in the page cache, as long as others do not need
the space.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from _common import Numbers, rounded

ANON_SECONDS = 0.01
ROLLUP_EVERY = 50  # samples


class Watch:
    """Peaks of one process; `since` starts anew, so that phases have peaks of their own."""

    def __init__(self) -> None:
        self._pid = 0
        self._peaks: dict[str, float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self, pid: int) -> None:
        """Watch this process from now on."""
        self._pid = pid
        self._thread.start()

    def now(self) -> Numbers:
        """Megabytes (10^6 bytes) at this moment."""
        return {f"{name}_mb": rounded(value / 1e6) for name, value in self._look(whole=True).items()}

    def since(self) -> Numbers:
        """Peaks since the last call, in megabytes; the moment of the call counts for both."""
        found = self._look(whole=True)
        with self._lock:
            peaks, self._peaks = self._peaks, dict(found)
        return {f"{name}_mb": rounded(max(peaks.get(name, 0), value) / 1e6) for name, value in found.items()}

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()

    def _sample(self) -> None:
        count = 0
        while not self._stop.wait(ANON_SECONDS):
            found = self._look(whole=count % ROLLUP_EVERY == 0)
            count += 1
            with self._lock:
                for name, value in found.items():
                    self._peaks[name] = max(self._peaks.get(name, 0), value)

    def _look(self, *, whole: bool) -> dict[str, float]:
        """Bytes; nothing of a process that has ended."""
        try:
            found = {"anon": _field(self._pid, "status", "RssAnon")}
            if whole:
                found["file"] = _field(self._pid, "smaps_rollup", "Pss_File")
                found["pss"] = _field(self._pid, "smaps_rollup", "Pss")
        except (OSError, StopIteration):
            return {}
        return found


def disk_bytes(pid: int) -> int:
    """What a process has made the disk read."""
    return int(_line(pid, "io", "read_bytes"))


def _field(pid: int, file: str, name: str) -> float:
    return float(_line(pid, file, name).removesuffix("kB")) * 1024


def _line(pid: int, file: str, name: str) -> str:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))
