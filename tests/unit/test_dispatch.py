"""Which replica gets a request, and how long its silence is natural. No processes here."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest

from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.client import least_loaded
from multimodal_gen.engine.patience import Patience
from multimodal_gen.engine.readings import Readings, total, total_text
from multimodal_gen.engine.ticket import TextTicket, Ticket
from multimodal_gen.environment import worker_threads
from multimodal_gen.messages import Gauges, TextGauges
from multimodal_gen.pipelines import registry
from multimodal_gen.request import ImageRequest, SamplingParams
from multimodal_gen.resolve import resolve
from multimodal_gen.text import TextRequest

pytestmark = [pytest.mark.unit]

CARD = registry.describe(EngineConfig())


def request(size: int = 64, steps: int = 4, n: int = 1, **changes: object) -> ImageRequest:
    params = SamplingParams(width=size, height=size, num_inference_steps=steps, num_outputs_per_prompt=n, seed=1)
    made = resolve(request_id="r", prompt="a cat", params=params, card=CARD, max_cost=10**12)
    return msgspec.structs.replace(made, **changes)


@dataclass
class Standing:
    """What dispatch looks at."""

    state: str
    cost: float


def test_the_ready_replica_with_the_least_to_do_is_next() -> None:
    replicas = [Standing("ready", 50.0), Standing("restarting", 0.0), Standing("ready", 20.0), Standing("ready", 20.0)]
    assert least_loaded(replicas) is replicas[2]
    replicas[2].state = "loading"
    assert least_loaded(replicas) is replicas[3]
    assert least_loaded([Standing("restarting", 0.0)]) is None


def test_work_that_is_done_counts_no_more() -> None:
    ticket = Ticket(request(steps=10, n=2), lambda _: None, 0.0, [])
    assert ticket.cost_left == ticket.request.cost == 20 * ticket.request.row_tokens
    ticket.steps_done = 15
    assert ticket.cost_left == ticket.request.cost / 4
    ticket.steps_done = 25  # rows that another process had begun are counted from there; never less than nothing
    assert ticket.cost_left == 0


def test_gauges_of_replicas_add_up_and_the_longest_step_shows() -> None:
    one = Gauges(1, 2, 0.5, 1, 100, 10, 3, 4)
    assert total([]) is None
    assert total([one]) == one
    assert total([one, Gauges(1, 0, 0.2, 1, 100, 5, 0, 1)]) == Gauges(2, 2, 0.5, 2, 200, 15, 3, 5)


def test_a_worker_has_the_whole_limit_until_it_has_done_as_much() -> None:
    patience = Patience(600.0, batch_tokens=10**6)
    small, large = request(64), request(256)
    assert patience.limit([small]) == 600.0
    patience.spoke(0.2, small.row_tokens)
    assert patience.limit([small]) == 600.0, "nobody has seen it decode yet"
    patience.finished(small)
    assert patience.limit([small]) == 30.0
    assert patience.limit([large]) == 600.0
    assert patience.limit([small, small]) == 600.0, "a step of both is larger than any so far"
    patience.spoke(0.3, 2 * small.row_tokens)
    assert patience.limit([small, small]) == 30.0
    assert patience.limit([request(64, n=2)]) == 600.0, "two rows in a row have not been decoded yet"


def test_the_limit_follows_the_longest_silence_up_to_the_setting() -> None:
    patience = Patience(600.0)
    work = request(64)
    patience.spoke(0.1, work.row_tokens)
    patience.finished(work)
    for silence, limit in ((5.0, 30.0), (20.0, 100.0), (7.0, 100.0), (200.0, 600.0)):
        patience.spoke(silence)
        assert patience.limit([work]) == limit
    short = Patience(3.0, longest=0.1, stepped=10**6, decoded=10**6)
    assert short.limit([work]) == 3.0


def test_latents_alone_and_adapters_are_no_measure() -> None:
    patience = Patience(600.0)
    work = request(64)
    patience.spoke(0.1, work.row_tokens)
    patience.finished(request(64, output="latent"))
    assert patience.limit([work]) == 600.0
    patience.finished(work)
    assert patience.limit([work]) == 30.0
    pins = ("any",)
    assert patience.limit([msgspec.structs.replace(work, loras=pins)]) == 600.0, "a merge may come before the step"


def test_a_backlog_is_no_larger_than_the_steps_made_of_it() -> None:
    work = request(64)
    patience = Patience(600.0, batch_tokens=2 * work.row_tokens)
    patience.spoke(0.1, 2 * work.row_tokens)
    patience.finished(work)
    assert patience.limit([work] * 50) == 30.0


def test_cores_are_shared_out_unless_threads_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert worker_threads(EngineConfig(), 1).threads is None
    assert [worker_threads(EngineConfig(), n).threads for n in (2, 3, 16)] == [4, 2, 1]
    assert worker_threads(EngineConfig(threads=5), 4).threads == 5


def text(prompt: int = 10, max_tokens: int = 20, n: int = 1) -> TextRequest:
    return TextRequest(id="t", prompt=tuple(range(prompt)), max_tokens=max_tokens, n=n)


def test_a_text_costs_what_is_left_to_read_and_to_write() -> None:
    ticket = TextTicket(text(10, 20, n=2), lambda _: None, 0.0)
    assert ticket.cost_left == 10 + 2 * 20
    ticket.tokens_done = 1
    assert ticket.cost_left == 2 * 20 - 1
    ticket.tokens_done = 50
    assert ticket.cost_left == 0


def test_a_worker_of_texts_has_the_whole_limit_until_it_has_read_as_much() -> None:
    patience = Patience(600.0, chunk_tokens=100)
    assert patience.limit([text(50)]) == 600.0
    patience.spoke(0.2, 0, 50)
    assert patience.limit([text(50)]) == 30.0
    assert patience.limit([text(50), text(50)]) == 600.0
    patience.spoke(0.2, 0, 100)
    assert patience.limit([text(50)] * 10) == 30.0, "a step reads no more than a chunk"
    assert patience.limit([text(5000)]) == 30.0
    work = request(64)
    assert patience.limit([text(50), work]) == 600.0, "nobody has seen it make pictures"
    patience.spoke(0.2, work.row_tokens)
    patience.finished(work)
    patience.finished(text())
    assert patience.limit([text(50), work]) == 30.0


def test_what_texts_have_counted_outlives_their_worker_and_what_it_held_does_not() -> None:
    readings = Readings()
    assert readings.text == TextGauges()
    readings.note(TextGauges(running=3, kv_pages=10, kv_pages_used=7, generated_tokens=100, preemptions=1))
    readings.note(TextGauges(running=2, kv_pages=10, kv_pages_used=4, generated_tokens=120, preemptions=1))
    readings.forget()
    assert readings.text == TextGauges(generated_tokens=120, preemptions=1)
    readings.note(TextGauges(running=1, kv_pages=10, generated_tokens=5, step_seconds=0.5))
    assert readings.text.generated_tokens == 125
    both = total_text([readings.text, TextGauges(running=2, kv_pages=10, step_seconds=0.2)])
    assert (both.running, both.kv_pages, both.step_seconds) == (3, 20, 0.5)


def test_a_piece_of_decoding_brings_the_state_up_to_date_and_leaves_the_latest_step() -> None:
    readings = Readings()
    readings.note(Gauges(1, 0, 0.5, 1, 100, 10, 3, 4, step_stall_seconds=0.1, step_cache_bytes=64))
    readings.note(Gauges(0, 0, 0.0, 0, 0, 10, 3, 4, cached_steps=2))
    assert readings.gauges == Gauges(0, 0, 0.5, 1, 100, 10, 3, 4, step_stall_seconds=0.1, cached_steps=2)
    assert readings.tokens_per_second == 200.0
