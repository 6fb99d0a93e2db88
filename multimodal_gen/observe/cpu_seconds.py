"""CPU time of a server by component, read when Prometheus asks: no thread of its own that could die or run twice.

The kernel keeps the time of every process that lives, and of all children that have ended their sum. Workers are told
apart from helpers while they live; what a worker used after the last reading before its end counts as a helper's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import psutil
from prometheus_client.core import CounterMetricFamily

Process = tuple[int, float]  # id and time of its start: ids are used again


def _of_ended_children() -> float:
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def _of_children() -> dict[Process, float]:
    """Seconds of the child processes that live, or have ended and were not waited for yet."""
    found: dict[Process, float] = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it ended a moment ago, and is counted among those that have
            times = child.cpu_times()
            found[child.pid, child.create_time()] = float(times.user + times.system)
    return found


@dataclass
class CpuSeconds:
    """The counter `process_cpu_seconds_total{component}`: front, worker, helper."""

    workers: Callable[[], Collection[int]]
    """process ids of the ranks on this machine"""
    own: Callable[[], float] = time.process_time
    children: Callable[[], dict[Process, float]] = _of_children
    ended: Callable[[], float] = _of_ended_children
    _alive: dict[Process, float] = field(default_factory=dict)
    """workers of the last reading"""
    _ended_workers: float = 0.0
    _told: dict[str, float] = field(default_factory=dict)

    def read(self) -> dict[str, float]:
        """Seconds of user and system time since the server started. A counter never falls: between a process's end and
        the moment when it is waited for, the kernel counts it nowhere."""
        pids, children = set(self.workers()), self.children()
        # Ids of a group that ends are gone from `workers` before its processes are: once a worker, always one.
        workers = {key: seconds for key, seconds in children.items() if key[0] in pids or key in self._alive}
        self._ended_workers += sum(seconds for key, seconds in self._alive.items() if key not in workers)
        self._alive = workers
        helpers = sum(seconds for key, seconds in children.items() if key not in workers)
        now = {
            "front": self.own(),
            "worker": sum(workers.values()) + self._ended_workers,
            "helper": helpers + max(0.0, self.ended() - self._ended_workers),
        }
        self._told = {name: max(seconds, self._told.get(name, 0.0)) for name, seconds in now.items()}
        return self._told

    def family(self) -> CounterMetricFamily:
        """The series of this moment."""
        family = CounterMetricFamily(
            "process_cpu_seconds", "User and system CPU time since the server started.", labels=["component"]
        )
        for name, seconds in self.read().items():
            family.add_metric([name], seconds)
        return family
