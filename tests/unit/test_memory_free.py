"""How much memory is free: the machine, its control groups of both versions, and limits of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from multimodal_gen.memory.free import NO_LIMIT, free_bytes, host_memory

pytestmark = [pytest.mark.unit]

MB = 1 << 20


def files(folder: Path, **values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")
    return folder


def groups(folder: Path, text: str) -> Path:
    path = folder / "cgroup"
    path.write_text(text)
    return path


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    found = host_memory(tmp_path / "absent", tmp_path)
    ram = psutil.virtual_memory()
    assert found.total == ram.total
    assert found.free == pytest.approx(ram.available, rel=0.2)
    assert free_bytes("cpu", sharing=4) == pytest.approx(host_memory().free / 4, rel=0.2)


def test_version_2_groups_count_up_to_the_root_and_cached_files_are_free(tmp_path: Path) -> None:
    stat = f"anon {20 * MB}\ninactive_file {8 * MB}\nactive_file {2 * MB}"
    files(tmp_path / "a" / "b", memory__max="max", memory__current=30 * MB, memory__stat=stat)
    files(tmp_path / "a", memory__max=100 * MB, memory__current=40 * MB, memory__stat=stat)
    files(tmp_path, memory__stat=stat)  # the root has no limit
    found = host_memory(groups(tmp_path, "0::/a/b\n"), tmp_path)
    assert (found.total, found.free) == (100 * MB, 70 * MB)
    files(tmp_path / "a" / "b", memory__max=35 * MB)
    assert host_memory(groups(tmp_path, "0::/a/b\n"), tmp_path).free == 15 * MB


def test_version_1_groups_have_other_names_and_a_folder_of_their_own(tmp_path: Path) -> None:
    listed = groups(tmp_path, "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n")
    stat = f"cache {9 * MB}\ntotal_inactive_file {4 * MB}\ntotal_active_file {1 * MB}"
    own = tmp_path / "memory" / "job"
    files(own, memory__limit_in_bytes=50 * MB, memory__usage_in_bytes=30 * MB, memory__stat=stat)
    files(tmp_path / "memory", memory__limit_in_bytes=NO_LIMIT * 8 - 4096, memory__usage_in_bytes=1, memory__stat="")
    found = host_memory(listed, tmp_path)
    assert (found.total, found.free) == (50 * MB, 25 * MB)


def test_in_a_container_the_path_may_be_the_outer_machines(tmp_path: Path) -> None:
    files(tmp_path, memory__max=60 * MB, memory__current=10 * MB, memory__stat="inactive_file 0\nactive_file 0")
    assert host_memory(groups(tmp_path, "0::/docker/4711\n"), tmp_path).free == 50 * MB


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files(tmp_path, memory__max=60 * MB, memory__current=90 * MB, memory__stat="")
    assert host_memory(groups(tmp_path, "0::/\n"), tmp_path).free == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are counted on Linux only")
def test_limits_of_the_process_count() -> None:
    code = (
        "import resource; from multimodal_gen.memory.free import host_memory\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))\n"
        "before = host_memory().free; kept = bytearray(300 << 20); print(before, before - host_memory().free)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    before, fell = map(int, done.stdout.split())
    assert 0 < before < 1 << 30
    assert fell == pytest.approx(300 << 20, rel=0.05)
