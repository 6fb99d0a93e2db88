"""How many threads a worker gets: physical cores, affinity, quotas of control groups, and what the user says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from multimodal_gen import cores
from multimodal_gen.config import EngineConfig
from multimodal_gen.environment import default_threads, worker_threads

pytestmark = [pytest.mark.unit]


def machine(place: Path, siblings: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose logical processors have these siblings, all of which this process may use."""
    for number, text in enumerate(siblings):
        folder = place / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(len(siblings))))
    return place


def group(place: Path, lines: str, files: dict[str, str]) -> tuple[Path, Path]:
    """/proc/self/cgroup and /sys/fs/cgroup."""
    mount = place / "mount"
    for name, content in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(content)
    groups = place / "groups"
    groups.write_text(lines)
    return groups, mount


def test_the_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = machine(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2, monkeypatch)
    assert cores.usable_cores(tmp_path / "none", tmp_path, topology) == 4
    assert cores.physical({0, 1, 5}, topology) == 2


def test_processors_that_the_kernel_tells_nothing_of_count_each(tmp_path: Path) -> None:
    assert cores.physical({0, 3, 8}, tmp_path) == 3


@pytest.mark.parametrize(
    ("lines", "files", "wanted"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "350000 100000"}, 3),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000"}, 2),  # a container sees its own group as the root
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, 6),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "450000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 6),
        ("4:cpuset:/\n", {}, 6),
    ],
    ids=[
        "outer group",
        "container",
        "half a core",
        "no limit",
        "version 1",
        "version 1 without limit",
        "no controller",
    ],
)
def test_a_quota_bounds_them(
    lines: str, files: dict[str, str], wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = machine(tmp_path / "cpus", [str(number) for number in range(6)], monkeypatch)
    assert cores.usable_cores(*group(tmp_path, lines, files), topology) == wanted


def test_workers_share_them_and_users_have_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multimodal_gen.environment.usable_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert worker_threads(EngineConfig(), 3).threads == 2
    assert worker_threads(EngineConfig(), 9).threads == 1
    assert worker_threads(EngineConfig(threads=5), 3).threads == 5
    assert default_threads() == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() is None
