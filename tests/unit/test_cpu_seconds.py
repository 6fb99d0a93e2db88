"""CPU time by component: a counter that never falls, whoever dies meanwhile."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import psutil
import pytest

from multimodal_gen.observe.cpu_seconds import CpuSeconds, Process
from tests.support.server import wait_for

pytestmark = [pytest.mark.unit]

BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"


class Machine:
    """The kernel's books: children that live, and the sum of those that were waited for."""

    def __init__(self) -> None:
        self.alive: dict[Process, float] = {}
        self.dead = 0.0
        self.own = 0.0
        self.pids: set[int] = set()

    def reader(self) -> CpuSeconds:
        return CpuSeconds(lambda: self.pids, lambda: self.own, lambda: dict(self.alive), lambda: self.dead)

    def reap(self, key: Process) -> None:
        self.dead += self.alive.pop(key)


def test_components_are_told_apart() -> None:
    machine = Machine()
    machine.own, machine.alive, machine.pids = 1.0, {(10, 0.0): 5.0, (11, 0.0): 2.0}, {10}
    seconds = machine.reader()
    assert seconds.read() == {"front": 1.0, "worker": 5.0, "helper": 2.0}
    machine.reap((11, 0.0))
    machine.alive[10, 0.0] = 6.0
    assert seconds.read() == {"front": 1.0, "worker": 6.0, "helper": 2.0}
    machine.pids = set()  # its group ends, it is not gone yet
    machine.alive[10, 0.0] = 6.5
    assert seconds.read() == {"front": 1.0, "worker": 6.5, "helper": 2.0}
    machine.reap((10, 0.0))
    assert seconds.read() == {"front": 1.0, "worker": 6.5, "helper": 2.0}
    machine.alive, machine.pids = {(10, 9.0): 0.25}, {10}  # the next worker has the same id
    assert seconds.read() == {"front": 1.0, "worker": 6.75, "helper": 2.0}


def test_no_component_ever_falls_and_none_is_counted_twice() -> None:
    rng = random.Random(1)
    machine = Machine()
    seconds, before = machine.reader(), dict.fromkeys(("front", "worker", "helper"), 0.0)
    for turn in range(3000):
        machine.own += rng.random()
        event = rng.randrange(5)
        if event == 0:
            pid = rng.randrange(6)
            if not any(key[0] == pid for key in machine.alive):
                machine.alive[pid, float(turn)] = 0.0
                if rng.random() < 0.5:
                    machine.pids.add(pid)
        elif event == 1 and machine.alive:
            key = rng.choice(list(machine.alive))
            machine.pids.discard(key[0])
            if rng.random() < 0.7:
                machine.reap(key)
            else:  # ended and not waited for: nobody counts it for a while
                machine.alive.pop(key)
        for key in machine.alive:
            machine.alive[key] += rng.random()
        if rng.random() < 0.5:
            now = seconds.read()
            assert all(now[name] >= before[name] for name in before)
            before = dict(now)
    assert before["worker"] > 0
    assert before["helper"] > 0


def test_real_children_are_counted_while_they_live_and_after() -> None:
    worker = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    helper = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    seconds = CpuSeconds(lambda: [worker.pid])
    first = seconds.read()
    try:
        for child in (worker, helper):
            assert child.stdout is not None
            assert child.stdout.readline() == b"done\n"
        alive = seconds.read()
        assert alive["worker"] >= 0.29
        assert alive["helper"] - first["helper"] >= 0.2
    finally:
        for child in (worker, helper):
            child.kill()
    wait_for(lambda: psutil.Process(helper.pid).status() == psutil.STATUS_ZOMBIE, 10, "the end")
    zombies = seconds.read()
    for child in (worker, helper):
        child.communicate()
    after = seconds.read()
    assert zombies["worker"] >= alive["worker"]
    assert after["worker"] >= alive["worker"]
    assert after["helper"] >= alive["helper"]
    assert after["front"] > 0


def test_a_child_that_ends_while_it_is_looked_at_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen(["true"])
    process = psutil.Process(gone.pid)
    gone.wait()
    monkeypatch.setattr(psutil.Process, "children", lambda self: [process] if self.pid == os.getpid() else [])
    assert CpuSeconds(lambda: [gone.pid]).read()["worker"] == 0.0
