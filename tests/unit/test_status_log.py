"""The scheduler's status lines: complete, in time, by the hour, and never in the scheduler's way."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multimodal_gen.observe import status_log
from multimodal_gen.observe.status_log import Folder, Standing, StatusLog, Stdout, open_status_log
from tests.support.server import wait_for

pytestmark = [pytest.mark.unit]

BUSY = [Standing("text", ("a", "b"), ("c",))]
IDLE = [Standing("text")]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Lines:
    """A target that keeps lines, or fails as it is told."""

    def __init__(self) -> None:
        self.found: list[bytes] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def write(self, line: bytes) -> None:
        self.gate.wait(30)
        if self.error is not None:
            raise self.error
        self.found.append(line)

    @property
    def parsed(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.found]


def never() -> list[Standing]:
    raise AssertionError("nobody has to look now")


def logging_to(target: Lines | Folder, clock: Callable[[], float]) -> StatusLog:
    return StatusLog(target, 10.0, replica=1, rank=0, clock=clock)


def test_a_line_says_who_when_and_what() -> None:
    clock, target = Clock(), Lines()
    status = logging_to(target, clock)
    status.note(False, never)
    clock.now = 10.0
    status.note(False, lambda: [*BUSY, Standing("pictures", ("p",))])
    status.close()
    first, second = target.parsed
    assert {name: first[name] for name in first if name != "time"} == {
        "replica": 1, "rank": 0, "side": "text", "running": ["a", "b"], "queued": ["c"], "dropped": 0,
    }  # fmt: skip
    assert (second["side"], second["running"]) == ("pictures", ["p"])
    written = time.mktime(time.strptime(first["time"], "%Y-%m-%dT%H:%M:%SZ"))
    assert abs(written - time.mktime(time.gmtime())) < 60


def test_nobody_looks_before_it_is_time() -> None:
    clock, target = Clock(), Lines()
    status = logging_to(target, clock)
    for clock.now in (0.0, 5.0, 9.9):
        status.note(False, never)
        status.note(True, never)
    for clock.now in (10.0, 20.0):
        status.note(False, lambda: BUSY)
        status.note(False, never)
    status.close()
    assert len(target.found) == 2


def test_the_last_line_never_tells_of_work_that_is_done() -> None:
    clock, target = Clock(), Lines()
    status = logging_to(target, clock)
    clock.now = 10.0
    status.note(False, lambda: BUSY)
    clock.now = 10.1
    status.note(True, lambda: IDLE)
    status.note(True, never)
    status.close()
    assert [line["running"] for line in target.parsed] == [["a", "b"], []]


def test_ids_of_any_letters_stay_one_line() -> None:
    clock, target = Clock(), Lines()
    status = logging_to(target, clock)
    clock.now = 10.0
    odd = 'quote " backslash \\ newline \n \u2028 \x00'
    status.note(False, lambda: [Standing("text", (odd,))])
    status.close()
    (line,) = target.found
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line)["running"] == [odd]


def test_a_target_that_hangs_holds_nobody_up_and_lost_lines_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_log, "QUEUE_LINES", 4)
    clock, target = Clock(), Lines()
    target.gate.clear()
    status = logging_to(target, clock)
    begin = time.monotonic()
    for turn in range(20):
        clock.now += 10.0
        status.note(False, lambda turn=turn: [Standing("text", (str(turn),))])
    assert time.monotonic() - begin < 2.0
    target.gate.set()
    wait_for(lambda: len(target.found) >= 4, 10, "the lines that found room")
    clock.now += 10.0
    status.note(False, lambda: [Standing("text", ("last",))])
    wait_for(lambda: bool(target.found) and target.parsed[-1]["running"] == ["last"], 10, "the last line")
    told = [line["running"] for line in target.parsed]
    lost = target.parsed[-1]["dropped"]
    assert lost >= 10
    assert len(told) + lost == 21


def test_a_scheduler_ends_though_its_target_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_log, "CLOSE_SECONDS", 0.05)
    clock, target = Clock(), Lines()
    target.gate.clear()
    status = logging_to(target, clock)
    clock.now = 10.0
    status.note(False, lambda: BUSY)
    begin = time.monotonic()
    status.close()
    assert time.monotonic() - begin < 2.0
    target.gate.set()


def test_failures_are_told_once_and_so_is_their_end(caplog: pytest.LogCaptureFixture) -> None:
    clock, target = Clock(), Lines()
    target.error = OSError("the disk is full")
    status = logging_to(target, clock)

    def write() -> None:
        clock.now += 10.0
        status.note(False, lambda: BUSY)

    with caplog.at_level(logging.WARNING):
        write()
        write()
        wait_for(lambda: status._writer._lines.empty() and bool(caplog.records), 10, "the lines")
        time.sleep(0.05)
        target.error = None
        write()
        status.close()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "the disk is full" in told[0]
    assert "again" in told[1]
    assert len(target.found) == 1


def test_a_folder_gets_a_file_by_the_hour_and_keeps_the_last_ones(tmp_path: Path) -> None:
    hour = Clock()
    folder = Folder(str(tmp_path / "a" / "b"), "scheduler-0-0", hour)
    for number in range(status_log.KEPT_FILES + 3):
        hour.now = number * 3600.0
        folder.write(b"first\n")
        folder.write(b"second\n")
    names = sorted(file.name for file in (tmp_path / "a" / "b").iterdir())
    assert len(names) == status_log.KEPT_FILES
    assert names[0] == "scheduler-0-0.1970-01-01T03.jsonl"
    assert (tmp_path / "a" / "b" / names[-1]).read_bytes() == b"first\nsecond\n"


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    others = ["scheduler-0-1.1970-01-01T00.jsonl", "scheduler-0-0.notes.jsonl", "letter.txt"]
    for name in others:
        (tmp_path / name).touch()
    hour = Clock()
    folder = Folder(str(tmp_path), "scheduler-0-0", hour)
    for number in range(status_log.KEPT_FILES + 3):
        hour.now = number * 3600.0
        folder.write(b"line\n")
    assert all((tmp_path / name).exists() for name in others)


def test_a_folder_that_is_removed_comes_back_with_the_next_line(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "log"), "s", Clock())
    folder.write(b"one\n")
    shutil.rmtree(tmp_path / "log")
    folder.write(b"two\n")
    assert next((tmp_path / "log").iterdir()).read_bytes() == b"two\n"


@pytest.mark.parametrize("target", ["file", "nul\0", "~nobody-of-that-name/log", "x" * 300], ids=lambda name: name[:8])
def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, target: str
) -> None:
    (tmp_path / "file").touch()
    path = target if target.startswith("~") else os.path.join(tmp_path, target)
    with caplog.at_level(logging.WARNING):
        status = open_status_log(path, 1e-6, 0, 0)
        assert status is not None
        for _ in range(3):
            status.note(False, lambda: BUSY)
        status.close()
    assert len(caplog.records) == 1
    assert "cannot be written" in caplog.records[0].getMessage()


def test_half_a_line_does_not_spoil_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path), "s", Clock())
    real, failures = os.write, iter([True])

    def half(descriptor: int, data: bytes) -> int:
        if next(failures, False):
            real(descriptor, data[:3])
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        folder.write(b'{"a": 1}\n')
    folder.write(b'{"b": 2}\n')
    assert next(tmp_path.iterdir()).read_bytes().splitlines() == [b'{"a', b'{"b": 2}']


def test_stdout_gets_whole_lines() -> None:
    code = (
        "from multimodal_gen.observe.status_log import *\n"
        "log = open_status_log('stdout', 1e-6, 0, 0)\n"
        "for _ in range(3): log.note(False, lambda: [Standing('text', tuple('x' * 100 for _ in range(2000)))])\n"
        "log.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert [len(json.loads(line)["running"]) for line in done.stdout.splitlines()] == [2000] * 3


def test_there_is_no_log_where_none_is_asked_for() -> None:
    assert open_status_log(None, 60.0, 0, 0) is None
    status = open_status_log("stdout", 60.0, 0, 0)
    assert status is not None
    assert isinstance(status._writer._target, Stdout)
    status.close()
