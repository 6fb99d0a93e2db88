"""Metrics of the text side: worked out at each reading, described on the page, nothing left of what is gone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from multimodal_gen.engine.admitted import Admitted
from multimodal_gen.engine.readings import Readings, total_text
from multimodal_gen.engine.ticket import TextTicket
from multimodal_gen.errors import Cancelled
from multimodal_gen.messages import MemoryChanged, TextFinished, TextGauges
from multimodal_gen.server.text_metrics import TextMetrics
from multimodal_gen.text import TextRequest, TextTimings, TextUsage

pytestmark = [pytest.mark.unit]

PAGE = (Path(__file__).parents[2] / "docs" / "openai_api.md").read_text(encoding="utf-8")
STEP = TextGauges(
    running=3, waiting=2, kv_pages=100, kv_pages_used=30, kv_pages_cached=20, step_seconds=0.05, step_rows=3,
    step_tokens=40, prompt_tokens=500, cached_tokens=200, generated_tokens=60, preemptions=1,
)  # fmt: skip


@dataclass
class Engine:
    """What the metrics read of an engine's client: its tickets and its workers' readings are the real ones."""

    admitted: Admitted = field(default_factory=Admitted)
    readings: list[Readings] = field(default_factory=lambda: [Readings()])

    @property
    def text_gauges(self) -> TextGauges:
        return total_text([readings.text for readings in self.readings])


class Watched:
    def __init__(self) -> None:
        self.engine = Engine()
        self.registry = CollectorRegistry()
        TextMetrics(self.engine, self.registry)  # type: ignore[arg-type]

    def ask(self, name: str, key: str | None = None, *, started: bool = False, n: int = 1) -> TextTicket:
        request = TextRequest(id=name, prompt=(1,), max_tokens=4, routing_key=key, n=n)
        ticket = TextTicket(request, lambda _: None, 0.0)
        ticket.started = started
        self.engine.admitted.add(ticket)
        return ticket

    def shown(self) -> dict[str, float]:
        lines = generate_latest(self.registry).decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_what_is_asked_and_answered_shows_at_once() -> None:
    watched = Watched()
    waiting, running = watched.ask("a"), watched.ask("b", started=True)
    assert (watched.shown()["mmgen_text_waiting"], watched.shown()["mmgen_text_running"]) == (1, 1)
    watched.engine.admitted.answered(waiting, Cancelled("gone"))
    watched.engine.admitted.answered(running, Cancelled("gone"))
    assert (watched.shown()["mmgen_text_waiting"], watched.shown()["mmgen_text_running"]) == (0, 0)


def test_routing_keys_are_counted_though_some_texts_have_none() -> None:
    watched = Watched()
    tickets = [watched.ask(f"a{i}", "alice", started=True) for i in range(4)]
    tickets += [watched.ask("b", "bob", started=True), watched.ask("b2", "bob"), watched.ask("c", "carol")]
    tickets += [watched.ask("none", started=True)]
    shown = watched.shown()
    assert shown["mmgen_num_unique_running_routing_keys"] == 2
    assert shown['mmgen_routing_key_running_requests{gt="3",le="5"}'] == 1
    assert shown['mmgen_routing_key_running_requests{gt="-Inf",le="1"}'] == 1
    assert shown['mmgen_routing_key_all_requests{gt="1",le="2"}'] == 1
    assert shown['mmgen_routing_key_all_requests{gt="-Inf",le="1"}'] == 1
    for ticket in tickets:
        watched.engine.admitted.answered(ticket, Cancelled("gone"))
    after = watched.shown()
    assert set(after) == set(shown)
    assert not [name for name, value in after.items() if "routing_key" in name and value]


def test_pages_and_tokens_are_those_of_the_workers() -> None:
    watched = Watched()
    watched.engine.readings = [Readings(), Readings()]
    for readings in watched.engine.readings:
        readings.note(STEP)
    shown = watched.shown()
    pages = {state: shown[f'mmgen_text_kv_pages{{state="{state}"}}'] for state in ("used", "cached", "free")}
    assert pages == {"used": 60, "cached": 40, "free": 100}
    assert shown["mmgen_text_prompt_tokens_total"] == 1000
    assert shown["mmgen_text_cached_tokens_total"] == 400
    assert shown["mmgen_text_generated_tokens_total"] == 120
    assert shown["mmgen_text_preemptions_total"] == 2
    assert shown["mmgen_last_text_step_seconds"] == 0.05


@pytest.mark.parametrize("end", ["death", "sleep"])
def test_of_a_worker_that_is_gone_only_what_is_counted_shows(end: str) -> None:
    watched = Watched()
    (readings,) = watched.engine.readings
    readings.note(STEP)
    readings.forget() if end == "death" else readings.note(MemoryChanged("", 0.1, 150))
    shown = watched.shown()
    assert not [value for name, value in shown.items() if "kv_pages" in name and value]
    assert shown["mmgen_last_text_step_answers"] == 0
    assert shown["mmgen_text_generated_tokens_total"] == 60
    readings.note(TextGauges(generated_tokens=5) if end == "death" else TextGauges(generated_tokens=65))
    assert watched.shown()["mmgen_text_generated_tokens_total"] == 65


def test_a_finished_text_tells_its_times_and_a_cancelled_one_does_not() -> None:
    watched = Watched()
    times = TextTimings(queue=0.5, prefill=1.5, decode=3.0, total=5.0)
    finished = TextFinished("a", TextUsage(10, 0, 22), times)
    watched.engine.admitted.answered(watched.ask("a", started=True, n=2), finished)
    watched.engine.admitted.answered(watched.ask("b", started=True), Cancelled("gone"))
    shown = watched.shown()
    assert shown["mmgen_text_ttft_seconds_count"] == 1
    assert shown["mmgen_text_ttft_seconds_sum"] == 2.0
    assert shown["mmgen_text_queue_seconds_sum"] == 0.5
    # Two choices of 11 tokens each, side by side: 10 of each came after the first.
    assert shown["mmgen_text_tpot_seconds_sum"] == pytest.approx(0.3)


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    watched = Watched()
    watched.engine.admitted.answered(watched.ask("a"), TextFinished("a", TextUsage(1, 0, 1), TextTimings()))
    assert watched.shown()["mmgen_text_tpot_seconds_count"] == 0


def test_every_metric_is_described() -> None:
    names = re.findall(r"^# TYPE (\S+)", generate_latest(Watched().registry).decode(), re.MULTILINE)
    assert not [name for name in names if not name.endswith("_created") and f"`{name}" not in PAGE]
