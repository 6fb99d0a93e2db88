"""What Prometheus reads of the text side; there only where a language model is served."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from multimodal_gen.messages import TextFinished, TextGauges
from multimodal_gen.observe.gauge_histogram import GaugeHistogram
from multimodal_gen.text import TextRequest

if TYPE_CHECKING:
    from multimodal_gen.engine.client import EngineClient

FIRST_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TOKEN_SECONDS = (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 3.0)
REQUESTS_PER_KEY = (1, 2, 3, 5, 7, 10, 20, 50, 100, 200)

RUNNING_PER_KEY = GaugeHistogram(
    "mmgen_routing_key_running_requests", "Routing keys by how many of their texts run.", REQUESTS_PER_KEY
)
ALL_PER_KEY = GaugeHistogram(
    "mmgen_routing_key_all_requests", "Routing keys by how many of their texts run or wait.", REQUESTS_PER_KEY
)


class TextMetrics:
    """Distributions of finished texts, and the state of the text side at each reading."""

    def __init__(self, engine: EngineClient, registry: CollectorRegistry) -> None:
        """Registers its metrics and has the engine's client tell of every finished text."""
        self._first = Histogram(
            "mmgen_text_ttft_seconds",
            "From the arrival of a text's request at the worker to its first token.",
            buckets=FIRST_SECONDS,
            registry=registry,
        )
        self._queue = Histogram(
            "mmgen_text_queue_seconds", "Waiting of a text before its first step.", buckets=FIRST_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._token = Histogram(
            "mmgen_text_tpot_seconds",
            "Mean time per token of an answer after its first.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        registry.register(_TextState(engine))
        engine.admitted.on_text = self.finished

    def finished(self, request: TextRequest, answer: TextFinished) -> None:
        """Record one finished text. Its choices are written side by side, each with its share of the tokens."""
        times, following = answer.timings, answer.usage.completion_tokens / request.n - 1
        self._queue.observe(times.queue)
        self._first.observe(times.queue + times.prefill)
        if following > 0:
            self._token.observe(times.decode / following)


class _TextState(Collector):
    """Everything is worked out when Prometheus asks, from the tickets of the front and the latest word of each living
    worker: nothing is shown of requests that are answered and workers that are gone."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        admitted, gauges = self._engine.admitted, self._engine.text_gauges
        yield GaugeMetricFamily("mmgen_text_running", "Texts being written.", admitted.texts_running)
        yield GaugeMetricFamily("mmgen_text_waiting", "Texts waiting for their first step.", admitted.texts_waiting)
        yield from _engine(gauges)
        yield from _routing_keys([(ticket.request.routing_key, ticket.started) for ticket in admitted.texts])


def _engine(gauges: TextGauges) -> Iterator[Metric]:
    pages = GaugeMetricFamily("mmgen_text_kv_pages", "Pages of keys and values, by who holds them.", labels=["state"])
    free = gauges.kv_pages - gauges.kv_pages_used - gauges.kv_pages_cached
    for state, count in (("used", gauges.kv_pages_used), ("cached", gauges.kv_pages_cached), ("free", free)):
        pages.add_metric([state], count)
    yield pages
    yield GaugeMetricFamily("mmgen_last_text_step_seconds", "The latest step of text.", gauges.step_seconds)
    yield GaugeMetricFamily("mmgen_last_text_step_tokens", "Its tokens.", gauges.step_tokens)
    yield GaugeMetricFamily("mmgen_last_text_step_answers", "Its answers.", gauges.step_rows)
    yield CounterMetricFamily("mmgen_text_prompt_tokens", "Tokens of prompts.", gauges.prompt_tokens)
    yield CounterMetricFamily("mmgen_text_cached_tokens", "Those found in the prefix cache.", gauges.cached_tokens)
    yield CounterMetricFamily("mmgen_text_generated_tokens", "Tokens of answers.", gauges.generated_tokens)
    yield CounterMetricFamily(
        "mmgen_text_preemptions", "Answers that lost their pages and were computed anew.", gauges.preemptions
    )


def _routing_keys(texts: list[tuple[str | None, bool]]) -> Iterator[Metric]:
    """Of (key, whether it runs); texts without a key are nobody's."""
    running = Counts(key for key, runs in texts if runs and key is not None)
    every = Counts(key for key, _ in texts if key is not None)
    yield GaugeMetricFamily(
        "mmgen_num_unique_running_routing_keys", "Different routing keys of the texts that run.", len(running)
    )
    yield RUNNING_PER_KEY.family(running.values())
    yield ALL_PER_KEY.family(every.values())
