"""A limit on the memory of a process that a benchmark starts: a control group, or RLIMIT_DATA where none can be made.

A control group bounds all that the process makes the kernel hold, its page cache included: what does not fit is read
from the disk again. It is made inside the group that the benchmark runs in, so every limit above holds as before.
RLIMIT_DATA bounds private writable memory, touched or not; the page cache stays out of it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limit:
    """Made by `limited`."""

    kind: str
    """cgroup v1, cgroup v2 or RLIMIT_DATA"""
    nbytes: int
    inside: Callable[[], None]
    """confines the process that calls it"""
    group: Path | None = None

    def peak(self) -> int | None:
        """Most bytes that the group held, page cache included; None where that is not counted."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if self.group is not None and (self.group / name).exists():
                return int((self.group / name).read_text())
        return None


@dataclass(frozen=True)
class _Version:
    kind: str
    group: Path  # of the benchmark
    limit: str
    with_swap: tuple[str, int]  # file, and how much more than the limit: memory stays memory


@contextmanager
def limited(resident: int, data: int, allowed: int) -> Iterator[Limit]:
    """A limit for one process: `allowed` bytes beyond what a process that only imports needs.

    Args:
        resident: of such a process, its share of mapped files included.
        data: its private writable memory, touched or not (VmData).
    """
    for version in _versions():
        group = version.group / f"mmgen-bench-{os.getpid()}"
        nbytes = resident + allowed
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if _confined(group, version, nbytes):
                yield Limit(version.kind, nbytes, _joining(group / "cgroup.procs"), group)
                return
        finally:
            _remove(group)
    nbytes = data + allowed
    yield Limit("RLIMIT_DATA", nbytes, lambda: resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes)))


def _versions() -> Iterator[_Version]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            folder = MOUNT / "memory" / path.strip("/")
            yield _Version("cgroup v1", folder, "memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", 1))
        elif number == "0" and not controllers:
            yield _Version("cgroup v2", MOUNT / path.strip("/"), "memory.max", ("memory.swap.max", 0))


def _confined(group: Path, version: _Version, nbytes: int) -> bool:
    try:
        (group / version.limit).write_text(str(nbytes))
    except OSError:  # version 2: the controller is not handed down to this group
        return False
    name, share = version.with_swap
    with contextlib.suppress(OSError):  # a kernel that does not count swap
        (group / name).write_text(str(nbytes * share))
    return True


def _joining(procs: Path) -> Callable[[], None]:
    def join() -> None:
        procs.write_text("0")  # the process that writes

    return join


def _remove(group: Path) -> None:
    for _ in range(100):  # the kernel lets go of a process a moment after it was waited for
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)
