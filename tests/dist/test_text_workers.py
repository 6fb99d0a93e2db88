"""Texts beside pictures in one worker: real processes, tiny models. Who waits, who dies with whom, what comes back."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from multimodal_gen.config import ServerConfig
from multimodal_gen.engine.client import EngineClient
from multimodal_gen.engine.ticket import TextTicket
from multimodal_gen.errors import (
    Asleep,
    Cancelled,
    MmgenError,
    OutOfMemory,
    QueueFull,
    UnsupportedEndpoint,
    WorkerCrashed,
)
from multimodal_gen.llm.answers import Answers
from multimodal_gen.messages import Progress, Started, TextDelta, TextFinished
from multimodal_gen.text import TextOutput
from tests.support.checkpoints import make_z_image
from tests.support.engine import Running, forgive_deaths, running
from tests.support.server import wait_for
from tests.support.text_core import answer, ask, make_text_folder, open_core

pytestmark = [pytest.mark.dist]

PROMPT = tuple(range(5, 25))
SETTINGS: dict[str, Any] = {
    "llm_dtype": "float32",
    "kv_cache_memory": 16 << 20,
    "max_queued_requests": 4,
    "tpot_budget_ms": 10.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder("llama", tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    pictures = make_z_image(tmp_path_factory.mktemp("pictures") / "z")
    with pytest.MonkeyPatch.context() as patch:
        forgive_deaths(patch)
        with running(model_path=str(pictures), llm_path=str(folder), **SETTINGS) as engine:
            engine.wait_ready()
            yield engine


class Asking:
    """Texts of one engine."""

    def __init__(self, engine: Running) -> None:
        self.engine = engine
        self._names = iter(range(10**6))

    def submit(self, prompt: Sequence[int] = PROMPT, max_tokens: int = 12, **more: Any) -> TextTicket:
        async def admit() -> TextTicket:
            return self.engine.client.submit_text(ask(f"t{next(_NAMES)}", prompt, max_tokens, **more))

        return self.engine.do(admit())

    def outputs(self, ticket: TextTicket) -> list[TextOutput]:
        async def collect() -> list[TextOutput]:
            answers = Answers(ticket.request)
            async for event in ticket:
                if isinstance(event, TextDelta):
                    answers.note(event)
                elif isinstance(event, TextFinished):
                    return answers.outputs(event)
            raise AssertionError("a ticket's stream ends with TextFinished")

        return self.engine.do(collect())

    def begun(self, ticket: TextTicket) -> None:
        """Until its first token."""

        async def wait() -> None:
            async for event in ticket:
                if isinstance(event, TextDelta):
                    return

        self.engine.do(wait())


_NAMES = iter(range(10**6))


def used_pages(engine: Running) -> int:
    return engine.client.text_gauges.kv_pages_used


def holds_nothing(engine: Running) -> bool:
    gauges = engine.client.text_gauges
    return gauges.running == gauges.waiting == 0


def test_workers_write_what_a_core_alone_writes_while_pictures_are_made(both: Running, folder: Path) -> None:
    texts, core = Asking(both), open_core(folder)
    picture = both.submit(steps=900)
    both.first_step(picture)
    prompts = [tuple(range(3 + at, 20 + 2 * at)) for at in range(4)]
    tickets = [texts.submit(prompt, 16, n=2) for prompt in prompts]
    found = [texts.outputs(ticket) for ticket in tickets]
    expected = answer(core, *(ask(f"r{at}", prompt, 16, n=2) for at, prompt in enumerate(prompts)))
    for at, outputs in enumerate(found):
        assert [output.token_ids for output in outputs] == [
            tuple(expected.ids(f"r{at}", choice)) for choice in range(2)
        ]
    assert picture.replica is not None, "the picture is not done yet: they shared the worker"
    both.cancel(picture)
    wait_for(lambda: not len(both.client.admitted) and used_pages(both) == 0, 5, "the cancel")


def test_neither_side_starves(both: Running) -> None:
    """Steps of both are made while both have work, whatever each takes."""
    texts = Asking(both)
    picture, text = both.submit(steps=900), texts.submit(max_tokens=200)

    async def first(ticket: Any, kinds: tuple[type, ...], count: int) -> None:
        async for event in ticket:
            count -= isinstance(event, kinds)
            if not count:
                return

    async def together() -> None:
        await asyncio.gather(first(picture, (Progress,), 20), first(text, (TextDelta,), 20))

    both.do(together(), 60)
    assert picture.replica is not None
    assert text.replica is not None
    both.cancel(picture)
    assert len(texts.outputs(text)[0].token_ids) == 180, "the rest of it"
    with pytest.raises(Cancelled):
        both.result(picture, 5)


def test_a_cancelled_text_gives_its_pages_back_at_once_and_the_others_go_on(both: Running) -> None:
    texts = Asking(both)
    doomed, other = texts.submit(max_tokens=200), texts.submit(tuple(range(40, 70)), max_tokens=60)
    texts.begun(doomed)
    both.cancel(doomed)
    with pytest.raises(Cancelled):
        texts.outputs(doomed)
    assert len(texts.outputs(other)[0].token_ids) == 60
    wait_for(lambda: used_pages(both) == 0 and holds_nothing(both), 5, "pages of nobody")


def test_more_texts_than_may_wait_are_refused_and_pictures_are_not(both: Running) -> None:
    texts = Asking(both)

    async def flood() -> tuple[list[TextTicket], MmgenError | None]:
        admitted = list[TextTicket]()
        try:
            for _ in range(10):  # nothing is heard of the worker in between: none of them has started
                admitted.append(both.client.submit_text(ask(f"t{next(_NAMES)}", PROMPT, 8)))
        except QueueFull as error:
            return admitted, error
        return admitted, None

    admitted, error = both.do(flood())
    assert len(admitted) == 4
    assert error is not None
    assert "--max-queued-requests" in error.message
    assert error.retry_after is not None
    assert both.make().shape == (64, 64, 3)
    for ticket in admitted:
        assert len(texts.outputs(ticket)[0].token_ids) == 8


def test_who_had_begun_dies_with_the_worker_and_who_waited_is_written_by_the_next(both: Running) -> None:
    both.wait_ready()
    texts, before = Asking(both), both.client.restarts
    begun = texts.submit(max_tokens=230)
    texts.begun(begun)
    both.signal(signal.SIGSTOP)
    waiting = texts.submit(max_tokens=10)
    generated = both.client.text_gauges.generated_tokens
    both.signal(signal.SIGKILL)
    with pytest.raises(WorkerCrashed):
        texts.outputs(begun)
    assert len(texts.outputs(waiting)[0].token_ids) == 10
    both.wait_ready()
    assert both.client.restarts == before + 1
    assert both.client.text_gauges.generated_tokens >= generated, "what was counted stays so"


def test_both_sides_sleep_and_wake_together(both: Running) -> None:
    both.wait_ready()
    texts = Asking(both)
    before, picture = texts.outputs(texts.submit()), both.make()

    async def rest(wake: bool) -> int:
        done = await (both.client.wake() if wake else both.client.sleep())
        return done.freed_bytes

    weights = both.client.ready.text.weight_bytes if both.client.ready and both.client.ready.text else 0
    assert weights > 0
    assert both.do(rest(False)) > weights + (16 << 20) // 2, "weights of both, and the pages"
    with pytest.raises(Asleep):
        texts.submit()
    both.do(rest(True))
    assert texts.outputs(texts.submit())[0].token_ids == before[0].token_ids
    assert (both.make() == picture).all()


def test_where_one_side_cannot_wake_both_sleep_on(both: Running) -> None:
    both.start_again("wake:oom:1")
    texts = Asking(both)
    expected = texts.outputs(texts.submit())[0].token_ids

    async def sleep() -> int:
        return (await both.client.sleep()).freed_bytes

    async def wake() -> None:
        await both.client.wake()

    both.do(sleep())
    with pytest.raises(OutOfMemory):
        both.do(wake())
    assert both.client.state == "asleep"
    with pytest.raises(Asleep):
        texts.submit()
    both.do(wake())
    assert texts.outputs(texts.submit())[0].token_ids == expected
    assert both.make().shape == (64, 64, 3)


def test_a_language_model_alone_is_a_whole_engine(folder: Path) -> None:
    with running(model_path="none", llm_path=str(folder), **SETTINGS) as engine:
        engine.wait_ready()
        texts, ready = Asking(engine), engine.client.ready
        assert ready is not None
        assert ready.text is not None
        assert (ready.device, ready.dtype, ready.rests) == ("cpu", "float32", True)
        assert engine.client.cards.name == "model"
        assert len(texts.outputs(texts.submit())[0].token_ids) == 12
        with pytest.raises(UnsupportedEndpoint, match="language model alone"):
            _ = engine.client.card

        async def started() -> bool:
            ticket = engine.client.submit_text(ask("last", PROMPT, 4))
            return isinstance(await anext(aiter(ticket)), Started)

        assert engine.do(started())


def test_an_engine_of_pictures_says_that_it_writes_no_text() -> None:
    with pytest.raises(UnsupportedEndpoint, match="--llm-path"):
        EngineClient(ServerConfig()).submit_text(ask("t", PROMPT))


def test_ranks_that_share_a_text_model_write_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    core = open_core(folder)
    with running(model_path="none", llm_path=str(folder), tp_size=2, **SETTINGS) as engine:
        engine.wait_ready()
        texts = Asking(engine)
        tickets = [texts.submit(tuple(range(3, 30 + at)), 16) for at in range(3)]
        found = [texts.outputs(ticket)[0].token_ids for ticket in tickets]
        dropped = texts.submit(max_tokens=200)
        texts.begun(dropped)
        engine.cancel(dropped)
        with pytest.raises(Cancelled):
            texts.outputs(dropped)
        wait_for(lambda: used_pages(engine) == 0, 5, "pages of nobody")
    for at, ids in enumerate(found):
        assert ids == tuple(answer(core, ask("r", tuple(range(3, 30 + at)), 16)).ids("r"))


def test_ranks_take_the_same_turns_of_both_sides(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which side is next follows from measured times: ranks that measured for themselves would come apart."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    core, pictures = open_core(folder), make_z_image(tmp_path / "z")
    with running(model_path=str(pictures), llm_path=str(folder), tp_size=2, **SETTINGS) as engine:
        engine.wait_ready()
        texts = Asking(engine)
        drawn = [engine.submit(steps=60, seed=seed) for seed in range(3)]
        tickets = [texts.submit(tuple(range(3, 30 + at)), 40) for at in range(3)]
        found = [texts.outputs(ticket)[0].token_ids for ticket in tickets]
        assert [engine.result(ticket).shape for ticket in drawn] == [(64, 64, 3)] * 3
        assert engine.client.restarts == 0
    for at, ids in enumerate(found):
        assert ids == tuple(answer(core, ask("r", tuple(range(3, 30 + at)), 40)).ids("r"))
