"""What operators see of texts, with real workers: status lines, pages of keys and values, a worker that hangs."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from multimodal_gen.engine.ticket import TextTicket
from multimodal_gen.errors import Cancelled, WorkerCrashed
from multimodal_gen.messages import TextDelta
from tests.support.engine import Running, forgive_deaths, running
from tests.support.server import wait_for
from tests.support.text_core import ask, make_text_folder

pytestmark = [pytest.mark.api]

LONG = 20_000  # tokens: seconds of work


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a long context."""
    where = tmp_path_factory.mktemp("models") / "tiny"
    return make_text_folder("llama", where, vocab_size=640, max_position_embeddings=1 << 15)


@pytest.fixture(scope="module")
def status(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of status lines."""
    return tmp_path_factory.mktemp("status")


@pytest.fixture(scope="module")
def engine(folder: Path, status: Path) -> Iterator[Running]:
    """It writes one text at a time."""
    with pytest.MonkeyPatch.context() as patch, running(
        model_path="none", llm_path=str(folder), llm_dtype="float32", kv_cache_memory=64 << 20, max_running_requests=1,
        step_timeout_s=4.0, scheduler_status_target=str(status), scheduler_status_interval_s=0.02,
    ) as engine:  # fmt: skip
        forgive_deaths(patch)
        engine.wait_ready()
        yield engine


def submit(engine: Running, name: str, max_tokens: int = 8, **more: Any) -> TextTicket:
    async def admit() -> TextTicket:
        return engine.client.submit_text(ask(name, range(5, 45), max_tokens, **more))

    return engine.do(admit())


def first_token(engine: Running, ticket: TextTicket) -> None:
    async def wait() -> None:
        async for event in ticket:
            if isinstance(event, TextDelta):
                return

    engine.do(wait())


def to_its_end(engine: Running, ticket: TextTicket) -> None:
    async def wait() -> None:
        async for _ in ticket:
            pass

    engine.do(wait())


def lines(status: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(status.iterdir()) for line in file.read_text().splitlines()]


def test_status_lines_name_what_runs_and_what_waits(engine: Running, status: Path) -> None:
    one, two = submit(engine, "one", LONG), submit(engine, "two")
    wanted = {"side": "text", "running": ["one"], "queued": ["two"]}
    wait_for(lambda: any(wanted.items() <= line.items() for line in lines(status)), 20, "a line of both")
    engine.cancel(one)
    to_its_end(engine, two)
    wait_for(lambda: lines(status)[-1]["running"] == [], 10, "the end of the work")
    assert lines(status)[-1]["queued"] == []


def test_pages_follow_what_holds_them(engine: Running) -> None:
    gauges = engine.client.text_gauges
    assert gauges.kv_pages > 0
    ticket = submit(engine, "a", LONG)
    first_token(engine, ticket)
    wait_for(lambda: engine.client.text_gauges.kv_pages_used > 3, 20, "pages")
    engine.cancel(ticket)
    with pytest.raises(Cancelled):
        to_its_end(engine, ticket)
    wait_for(lambda: engine.client.text_gauges.kv_pages_used == 0, 5, "their return")
    assert engine.client.text_gauges.running == 0
    before = engine.client.text_gauges.generated_tokens

    async def sleep() -> None:
        await engine.client.sleep()

    async def wake() -> None:
        await engine.client.wake()

    engine.do(sleep())
    asleep = engine.client.text_gauges
    assert (asleep.kv_pages, asleep.kv_pages_cached, asleep.generated_tokens) == (0, 0, before)
    engine.do(wake())
    wait_for(lambda: engine.client.text_gauges.kv_pages == gauges.kv_pages, 5, "the pages")


def test_a_worker_that_is_asked_for_its_stacks_goes_on(engine: Running) -> None:
    ticket = submit(engine, "b", 200)
    first_token(engine, ticket)
    before = engine.signal(signal.SIGUSR1)
    to_its_end(engine, ticket)
    to_its_end(engine, submit(engine, "c"))
    assert engine.pids() == before


def test_a_worker_that_stops_in_the_middle_of_a_text_is_replaced(engine: Running) -> None:
    before = engine.client.text_gauges.generated_tokens
    running, waiting = submit(engine, "running", LONG), submit(engine, "waiting")
    first_token(engine, running)
    (stopped,) = engine.signal(signal.SIGSTOP)
    with pytest.raises(WorkerCrashed):
        to_its_end(engine, running)
    to_its_end(engine, waiting)
    assert engine.pids() != [stopped]
    wait_for(lambda: engine.client.text_gauges.kv_pages_used == 0, 5, "an idle worker")
    assert engine.client.text_gauges.generated_tokens >= before + 8
