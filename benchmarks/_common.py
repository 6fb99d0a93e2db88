"""What all benchmarks share: side processes, interleaved rounds, statistics, the environment record, the JSON line.

Each side runs in a process of its own, as its users run it, so that neither profits from the other's settings (the
allocator's thresholds and OpenMP's wait policy belong to a process). The sides take turns, so that a change of the
machine's speed meets all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as files, the benchmarks see only their own folder: for tests.support
    sys.path.append(str(ROOT))

PACKAGES = ("torch", "diffusers", "transformers", "numpy")
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND", "MKL_NUM_THREADS")
# What we set for ourselves (multimodal_gen/config.py).
CALM = {"GOMP_SPINCOUNT": "20000"}

Numbers = dict[str, Any]


# --- sides ------------------------------------------------------------------------------------------------------------


def environment(**extra: str) -> dict[str, str]:
    """The environment of a side: ours without MMGEN_*, with this checkout importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MMGEN_")}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false", **extra}


class SideEnded(SystemExit):
    """A side's process is gone; ends the benchmark where nobody expects it."""


class Side:
    """A process that holds one loaded pipeline and runs requests, one JSON line each (`_side.py`, or `script`)."""

    def __init__(
        self,
        *,
        calm: bool = False,
        script: str = "_side.py",
        python: str = sys.executable,
        inside: Callable[[], None] | None = None,
        watch: Callable[[int], None] = lambda pid: None,
        **options: Any,
    ) -> None:
        """Start and load; `options` are those of the script, `calm` is our OpenMP spin count (we set it ourselves).

        Args:
            python: the interpreter; another one has other packages, and not ours.
            inside: called in the new process before Python starts there, to confine it.
            watch: called with its id before it loads.

        Returns once the model is loaded. Raises: SideEnded.
        """
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script)), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(**(CALM if calm else {})),
            text=True,
            preexec_fn=inside,
        )
        watch(self._process.pid)
        try:
            self.hello: Numbers = self._read()
        except BaseException:
            self._end()
            raise

    def run(self, **request: Any) -> Numbers:
        """Run one request; see `_side.Request`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone: reading says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> Numbers:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SideEnded(f"a side ended with code {self._process.wait()}; its words are above")
        answer: Numbers = json.loads(line)
        return answer

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# --- rounds and statistics --------------------------------------------------------------------------------------------


def interleave(sides: Mapping[str, Callable[[int], Any]], rounds: int, max_seconds: float) -> dict[str, list[Any]]:
    """A B A B …: call every side with the round's number, in order; no round starts after `max_seconds`."""
    results: dict[str, list[Any]] = {name: [] for name in sides}
    begin = time.monotonic()
    for number in range(rounds):
        if number and time.monotonic() - begin > max_seconds:
            say(f"stopped after {number} of {rounds} rounds: --max-seconds {max_seconds:g} is over")
            break
        for name, run in sides.items():
            results[name].append(run(number))
        say(f"round {number + 1} of {rounds}: {time.monotonic() - begin:.0f} s")
    return results


def spread(values: Sequence[float]) -> Numbers:
    """Median, extremes and count."""
    return {
        "median": rounded(statistics.median(values)),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
        "n": len(values),
    }


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Numbers:
    """How many times the first takes the second: of the medians, and the extremes over rounds (values pair up)."""
    pairs = [a / b for a, b in zip(slow, fast, strict=True)]
    return {
        "of_medians": rounded(statistics.median(slow) / statistics.median(fast)),
        "min": rounded(min(pairs)),
        "max": rounded(max(pairs)),
    }


def figure(name: str, seconds: Mapping[str, Sequence[float]], goals: Mapping[str, float] | None = None) -> Numbers:
    """One line of the report (multimodal_gen/cli/bench_report.py): seconds of "ours" and of its peers, round by round.

    `goals`: how many times faster than a peer ours is to be.
    """
    return {
        "name": name,
        "sides": {side: spread(values) for side, values in seconds.items()},
        "times_faster": {side: ratio(values, seconds["ours"]) for side, values in seconds.items() if side != "ours"},
        "goals": dict(goals or {}),
    }


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


# --- quality ----------------------------------------------------------------------------------------------------------


def same_picture(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> Numbers:
    """Check that two uint8 [H, W, 3] pictures agree within rounding, so that speed is compared for the same work.

    float32: every value within 1. Half precision: both sides round at different places, and a random-weight model
    magnifies that, so the bound is a mean of 4. Raises: SystemExit.
    """
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    found = {
        "max_difference": int(difference.max()),
        "mean_difference": rounded(float(difference.mean())),
        "contrast": rounded(float(theirs.std())),  # a flat field would agree with any other
    }
    good = difference.max() <= 1 if dtype == "float32" else difference.mean() <= 4
    if not good or theirs.std() < 2:
        raise SystemExit(f"the two sides do not make the same picture in {dtype}: {found}")
    return found


# --- the record -------------------------------------------------------------------------------------------------------


def record(threads: int) -> Numbers:
    """Versions, machine and load: what a figure means nothing without."""
    return {
        "multimodal_gen": _own_version(),
        **{name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": threads,
        "load_before": rounded(os.getloadavg()[0]),
        "environment": {name: os.environ[name] for name in OPENMP if name in os.environ},
        "date": time.strftime("%Y-%m-%d"),
    }


def _own_version() -> str:
    from multimodal_gen import __version__

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return f"{__version__} {commit.stdout.strip()}".strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


# --- command line -----------------------------------------------------------------------------------------------------


def parser(doc: str, *, repeats: int, max_seconds: float) -> argparse.ArgumentParser:
    """The flags that all benchmarks share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats, help="rounds; default %(default)s")
    made.add_argument("--threads", type=int, default=cores(), help="CPU threads of each side; default: all cores")
    made.add_argument(
        "--max-seconds",
        type=float,
        default=max_seconds,
        help="no new round starts after this long; default %(default)s",
    )
    return made


def say(text: str) -> None:
    """Progress, on stderr: stdout belongs to the result."""
    print(text, file=sys.stderr, flush=True)


def finish(name: str, environment: Numbers, results: Numbers) -> None:
    """The last line of stdout."""
    print(json.dumps({"benchmark": name, "environment": environment, **results}))
