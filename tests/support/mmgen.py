"""The `mmgen` command in a process of its own, as a user runs it.

Most commands are forked from a process that has imported everything (`forker.py`); `fresh` ones are started as a shell
starts them, which costs seconds.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """What a finished command left."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def error(self) -> str:
        """The one line that a failed command owes its user; checked to be one."""
        assert self.code != 0, self
        assert self.out == "", self
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self
        assert "Traceback" not in self.err, self
        return lines[0]


def command(*arguments: str) -> list[str]:
    """The command line: the installed script where there is one beside this Python, else the module."""
    script = Path(sys.executable).parent / "mmgen"
    start = [str(script)] if script.exists() else [sys.executable, "-m", "multimodal_gen.cli.main"]
    return [*start, *arguments]


def environment(**variables: str) -> dict[str, str]:
    """Ours without MMGEN_*, with this checkout importable from any folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MMGEN_")}
    return {**kept, "PYTHONPATH": str(ROOT), **variables}


def mmgen(
    *arguments: str, folder: Path, stdin: str = "", timeout: float = 120.0, fresh: bool = False, **variables: str
) -> Done:
    """Run the command in `folder` and wait for it. Variables that are not ours are read by imports: they need a fresh
    process. Raises: subprocess.TimeoutExpired."""
    began = time.monotonic()
    if fresh or sys.platform != "linux" or not all(name.startswith("MMGEN_") for name in variables):
        done = subprocess.run(
            command(*arguments),
            cwd=folder,
            env=environment(**variables),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - began)
    code, out, err = _fork(arguments, folder, stdin, timeout, environment(**variables))
    if code == -signal.SIGALRM:
        raise subprocess.TimeoutExpired(["mmgen", *arguments], timeout, out, err)
    return Done(code, out, err, time.monotonic() - began)


def _fork(
    arguments: tuple[str, ...], folder: Path, stdin: str, timeout: float, variables: dict[str, str]
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that the forker runs."""
    forker = _forker()
    assert forker.stdin is not None
    assert forker.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        streams = {name: Path(place, name) for name in ("stdin", "stdout", "stderr")}
        for path in streams.values():
            path.write_text(stdin if path.name == "stdin" else "")
        order = {"arguments": arguments, "folder": str(folder), "timeout": timeout, "environment": variables}
        forker.stdin.write(json.dumps({**order, **{name: str(path) for name, path in streams.items()}}) + "\n")
        forker.stdin.flush()
        answer = forker.stdout.readline()
        assert answer, f"the forker ended with {forker.wait()}"
        return int(answer), streams["stdout"].read_text(), streams["stderr"].read_text()


@functools.cache
def _forker() -> subprocess.Popen[str]:
    """One for all tests; it ends with them, when its stdin does. numpy's BLAS would start threads at its import."""
    calm = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "20000"), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forker.py"))],
        env=environment(**calm),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
