"""The `mmgen` command in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
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


def mmgen(*arguments: str, folder: Path, stdin: str = "", timeout: float = 120.0, **variables: str) -> Done:
    """Run the command in `folder` and wait for it."""
    began = time.monotonic()
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
