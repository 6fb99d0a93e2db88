"""A worker that hangs anywhere between its start and the moment when it is ready is found, says where, and is replaced.

The workers are real processes; what makes some of them hang is put into the program that they start with.
"""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import msgspec
import pytest

from multimodal_gen.config import ServerConfig
from multimodal_gen.engine import process
from multimodal_gen.engine.client import EngineClient
from multimodal_gen.engine.group import Placed
from multimodal_gen.errors import WorkerCrashed
from multimodal_gen.messages import Load
from tests.support.engine import forgive_deaths, running
from tests.support.server import wait_for

pytestmark = [pytest.mark.api]

LIMIT_S = 2.0
IN_AN_IMPORT = "import multimodal_gen\ndef slow_import():\n import time; time.sleep(1000)\nslow_import()\n"
BEFORE_READY = """
import multimodal_gen, multimodal_gen.engine.worker as worker
def read_weights(*_):
    import time; time.sleep(1000)
worker._run = read_weights
"""
HALF_A_WORD = """
import multimodal_gen, os, time
os.write(int(sys.argv[2]), bytes([0, 0, 0, 0, 0]))
def half_a_word(): time.sleep(1000)
half_a_word()
"""


def hang(monkeypatch: pytest.MonkeyPatch, code: str, number: int = 0) -> None:
    """Worker `number` runs `code` where it would import the package; the others start as ever."""
    whole = process.LAUNCH
    before, _, after = whole.partition("import multimodal_gen\n")
    start = process.WorkerProcess.start
    programs = iter([*[whole] * number, before + code + after])

    async def start_next(log_level: str) -> process.WorkerProcess:
        monkeypatch.setattr(process, "LAUNCH", next(programs, whole))
        return await start(log_level)

    monkeypatch.setattr(process.WorkerProcess, "start", start_next)


@pytest.mark.parametrize(
    ("code", "where"),
    [(IN_AN_IMPORT, "in slow_import"), (BEFORE_READY, "in read_weights"), (HALF_A_WORD, "in half_a_word")],
    ids=["in an import", "before it is ready", "in the middle of a message"],
)
def test_a_start_that_hangs_is_killed_and_says_where(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: str, where: str
) -> None:
    hang(monkeypatch, code)
    with running(load_timeout_s=LIMIT_S) as engine:
        began = time.monotonic()
        wait_for(lambda: bool(engine.pids()), 10, "a worker")
        (hanging,) = engine.pids()
        wait_for(lambda: hanging not in engine.alive(), 30, "its end")
        assert time.monotonic() - began >= LIMIT_S - 1
        assert engine.client.state == "loading"
        wait_for(lambda: engine.client.restarts == 1, 10, "a restart")
    assert where in capfd.readouterr().err


def test_of_ranks_every_one_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hang(monkeypatch, IN_AN_IMPORT, number=1)
    with running(load_timeout_s=LIMIT_S, ring_degree=2) as engine:
        wait_for(lambda: engine.client.restarts == 1, 30, "a restart")
    told = [record.getMessage().partition(" (")[0] for record in caplog.records if "stacks" in record.getMessage()]
    assert told[:2] == ["stacks of rank 0", "stacks of rank 1"]
    said = capfd.readouterr().err
    assert said.count("most recent call first") >= 2
    assert "in slow_import" in said


def test_a_worker_that_is_stopped_before_it_says_a_word_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    forgive_deaths(monkeypatch)
    with running(load_timeout_s=LIMIT_S) as engine:
        wait_for(lambda: bool(engine.pids()), 10, "a worker")
        (stopped,) = engine.signal(signal.SIGSTOP)
        wait_for(lambda: stopped not in engine.alive(), 30, "its end")
        wait_for(lambda: engine.pids() not in ([], [stopped]), 10, "another worker")


def listens(pid: int) -> bool:
    """Whether a process would write its stacks at SIGUSR1, rather than end."""
    (caught,) = [row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("SigCgt:")]
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


@pytest.mark.slow
def test_a_model_that_hangs_while_it_loads_is_loaded_again(capfd: pytest.CaptureFixture[str]) -> None:
    with running("load:hang:1") as engine:
        (replica,) = engine.client.replicas
        wait_for(lambda: bool(engine.pids()) and listens(engine.pids()[0]), 30, "a worker")
        said = ""
        while "in trip" not in said:  # so long it was on its way, and that may take as long as the machine is slow
            (hanging,) = engine.signal(signal.SIGUSR1)
            time.sleep(0.2)
            said += capfd.readouterr().err
        assert engine.client.restarts == 0
        patient, config = replica._load, replica._load.config
        replica._load = msgspec.structs.replace(
            patient, config=msgspec.structs.replace(config, fault=None, load_timeout_s=1.0)
        )
        wait_for(lambda: engine.client.restarts == 1, 30, "a restart")
        replica._load = msgspec.structs.replace(patient, config=msgspec.structs.replace(config, fault=None))
        engine.wait_ready()
        assert engine.pids() != [hanging]
        assert engine.make().shape == (64, 64, 3)


class Nowhere:
    """A place where ranks never start, as a cluster that does not answer."""

    async def start(self, load: Load) -> Placed:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")


def test_a_place_that_never_answers_ends_the_start_and_names_the_setting() -> None:
    async def main() -> None:
        client = EngineClient(ServerConfig(load_timeout_s=0.5, log_level="error"))
        client.replicas[0].place = Nowhere()
        await client.start()
        with pytest.raises(WorkerCrashed, match="--load-timeout-s"):
            await asyncio.wait_for(client.wait_ready(), 10)
        await client.stop()

    asyncio.run(main())
