"""Memory that this process may still use: the machine's, its control groups' (v1 and v2), its own limits'.

Files in the page cache count as free: the kernel takes them back when it needs them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

GROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # version 1 says "no limit" with a number beyond any machine


@dataclass(frozen=True)
class Names:
    """What a version of control groups calls its files and counters."""

    limit: str
    used: str
    cached: tuple[str, ...]  # of memory.stat: bytes of files, which the group's own limit makes the kernel drop


V1 = Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
V2 = Names("memory.max", "memory.current", ("inactive_file", "active_file"))


@dataclass(frozen=True)
class HostMemory:
    """RAM in bytes, as this process may use it."""

    total: int
    free: int


class Promise:
    """RAM that this process was given and has not touched yet, so that the machine takes it for free.

    It counts as used as long as this object lives; what is touched meanwhile counts twice.
    """

    def __init__(self, size: int) -> None:
        self.bytes = size
        _promises.add(self)


_promises: weakref.WeakSet[Promise] = weakref.WeakSet()


def free_bytes(device: torch.device | str, sharing: int = 1) -> int:
    """Free memory where weights would go, for one of `sharing` ranks that use the same device."""
    if str(device).partition(":")[0] == "cpu":
        return max(0, host_memory().free // sharing - sum(promise.bytes for promise in _promises))
    import torch

    return torch.cuda.mem_get_info(torch.device(device))[0] // sharing


def host_memory(groups: Path = GROUPS, mount: Path = MOUNT) -> HostMemory:
    """RAM of this process. Folders are arguments for tests."""
    ram = psutil.virtual_memory()
    bounds = [(ram.total, ram.available), *_group_bounds(groups, mount), *_own_bounds()]
    return HostMemory(min(total for total, _ in bounds), max(0, min(free for _, free in bounds)))


def _group_bounds(groups: Path, mount: Path) -> Iterator[tuple[int, int]]:
    """(limit, free) of every control group that this process is in, from its own to the outermost that is visible."""
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.exists() else []:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield from _up(mount / "memory", path, V1)
        elif number == "0" and not controllers:
            root = mount / "unified" if (mount / "unified").is_dir() else mount
            yield from _up(root, path, V2)


def _up(root: Path, path: str, names: Names) -> Iterator[tuple[int, int]]:
    # Inside a container the path may be the one that the machine outside sees; then only the mounted root is there.
    folder = root / path.strip("/")
    while True:
        bound = _bound(folder, names)
        if bound is not None:
            yield bound
        if folder == root or root not in folder.parents:
            return
        folder = folder.parent


def _bound(folder: Path, names: Names) -> tuple[int, int] | None:
    limit, used = _number(folder / names.limit), _number(folder / names.used)
    if limit is None or used is None or limit >= NO_LIMIT:
        return None
    counters = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    cached = sum(int(counters.get(name, "0")) for name in names.cached)
    return limit, limit - max(0, used - cached)


def _own_bounds() -> Iterator[tuple[int, int]]:
    """(limit, free) of what `ulimit -v` and `ulimit -d` leave to this process."""
    if sys.platform != "linux":
        return
    import resource

    used = psutil.Process().memory_info()
    for kind, taken in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, used.data)):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit, limit - taken


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None  # version 2 says "max" where there is no limit


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:  # not mounted, or not for us: then it bounds nothing that we can know
        return ""
