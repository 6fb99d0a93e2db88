"""What Prometheus reads of the language model's adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from multimodal_gen.engine.client import EngineClient
    from multimodal_gen.engine.text_loras import Loading

Origin = Literal["path", "tensors"]
MILLISECONDS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0)


class TextLoraMetrics:
    """Adapters that were loaded, and the state at each reading."""

    def __init__(self, engine: EngineClient, registry: CollectorRegistry) -> None:
        self._bytes = Counter(
            "mmgen_lora_tensor_load_bytes",
            "Tensors of the language model's adapters that were loaded.",
            ("origin",),
            registry=registry,
        )
        self._milliseconds = Histogram(
            "mmgen_lora_load_latency_ms",
            "Loading an adapter of the language model, in all replicas.",
            ("origin",),
            buckets=MILLISECONDS,
            registry=registry,
        )
        self._evicted = Counter("mmgen_text_lora_evicted", "Adapters that had to leave for another.", registry=registry)
        registry.register(_State(engine))

    def loaded(self, loading: Loading, origin: Origin) -> None:
        """Record one that is loaded now."""
        if loading.changed:
            self._bytes.labels(origin).inc(loading.info.bytes)
            self._milliseconds.labels(origin).observe(loading.seconds * 1000)
        self._evicted.inc(len(loading.evicted))


class _State(Collector):
    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        entries = self._engine.text_loras.entries.values()
        used = {ticket.request.adapter for ticket in self._engine.admitted.texts} - {None}
        yield GaugeMetricFamily("mmgen_text_lora_loaded", "Adapters of the language model in memory.", len(entries))
        yield GaugeMetricFamily(
            "mmgen_text_lora_pinned", "Those that are never evicted.", sum(entry.pinned for entry in entries)
        )
        yield GaugeMetricFamily("mmgen_text_lora_used", "Those that unanswered requests use.", len(used))
        yield GaugeMetricFamily("mmgen_text_lora_bytes", "Their tensors.", sum(entry.info.bytes for entry in entries))
