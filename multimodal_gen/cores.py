"""How many cores this process may compute on: physical ones, of those it is bound to, within its container's quota.

Matrix products gain nothing from the second thread of a core, and threads beyond a quota are stopped for the rest of
every period, mostly while the others wait for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores(groups: Path = GROUPS, mount: Path = MOUNT, topology: Path = TOPOLOGY) -> int:
    """At least 1. Folders are arguments for tests."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    bound = os.sched_getaffinity(0)
    return max(1, min(physical(bound, topology), *(int(quota) for quota in quotas(groups, mount)), len(bound)))


def physical(processors: Iterable[int], topology: Path = TOPOLOGY) -> int:
    """Cores that these logical processors are threads of; each counts by itself where the kernel does not say."""
    return len({_text(topology / f"cpu{each}" / "topology" / "thread_siblings_list") or each for each in processors})


def quotas(groups: Path = GROUPS, mount: Path = MOUNT) -> Iterator[float]:
    """Cores' worth of time that each control group around this process gives it, where it sets a limit (v1 and v2)."""
    for line in _text(groups).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root = mount / "unified" if (mount / "unified").is_dir() else mount
            yield from _up(root, path, ("cpu.max",))
        elif "cpu" in controllers.split(","):
            yield from _up(mount / "cpu", path, ("cpu.cfs_quota_us", "cpu.cfs_period_us"))


def _up(root: Path, path: str, files: tuple[str, ...]) -> Iterator[float]:
    # Inside a container the path may be the one that the machine outside sees; then only the mounted root is there.
    folder = root / path.strip("/")
    while True:
        words = " ".join(_text(folder / file) for file in files).split()
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):  # else "max", or -1
            yield int(words[0]) / int(words[1])
        if folder == root or root not in folder.parents:
            return
        folder = folder.parent


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):  # not mounted, or not for us: then it says nothing
        return ""
