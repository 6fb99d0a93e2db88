"""What Prometheus reads: `mmgen_*`, in a registry of its own, so that two servers in one process do not mix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from multimodal_gen.errors import Cancelled, CapacityError, MmgenError, UserError
from multimodal_gen.observe.cpu_seconds import CpuSeconds
from multimodal_gen.request import Timings
from multimodal_gen.server.lora_metrics import TextLoraMetrics
from multimodal_gen.server.text_metrics import TextMetrics

if TYPE_CHECKING:
    from multimodal_gen.engine.client import EngineClient
    from multimodal_gen.engine.job_runner import JobRunner

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
STEP_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Metrics:
    """Counters of the HTTP front and, at each reading, the state of the engine."""

    def __init__(self, engine: EngineClient, model: str, jobs: JobRunner | None = None) -> None:
        self._model = model
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineState(engine))
        registry.register(_Memory(engine))
        registry.register(_JobState(jobs))
        registry.register(_Cpu(engine))
        self.text_loras: TextLoraMetrics | None = None  # of a language model
        if engine.cards.text is not None:
            TextMetrics(engine, registry)
            self.text_loras = TextLoraMetrics(engine, registry)
        self._requests = Counter(
            "mmgen_requests", "Answered requests.", ("endpoint", "model", "outcome"), registry=registry
        )
        self._request_seconds = Histogram(
            "mmgen_request_seconds", "From request to answer.", ("endpoint",), buckets=SECONDS, registry=registry
        )
        self._queue_seconds = Histogram(
            "mmgen_queue_seconds", "Waiting of a request before its first step.", buckets=SECONDS, registry=registry
        )
        self._stage_seconds = Histogram(
            "mmgen_stage_seconds", "Time of a request in a stage.", ("stage",), buckets=SECONDS, registry=registry
        )
        self._step_seconds = Histogram(
            "mmgen_step_seconds", "Mean denoising step of a request.", buckets=STEP_SECONDS, registry=registry
        )
        media = "image" if engine.cards.pictures is None else engine.cards.pictures.media
        self._outputs = Counter(f"mmgen_{media}s", f"{media.capitalize()}s made.", registry=registry)
        self._jobs_done = Counter(
            "mmgen_jobs_done",
            "Video jobs that have ended: completed, or an error code.",
            ("outcome",),
            registry=registry,
        )
        self._job_seconds = Histogram(
            "mmgen_job_seconds", "From acceptance of a video job to its end.", buckets=SECONDS, registry=registry
        )
        self._jobs_resumed = Counter(
            "mmgen_jobs_resumed", "Video jobs that went on from a checkpoint.", registry=registry
        )
        self._enhanced = Counter(
            "mmgen_enhanced_prompts",
            "Prompts that the language model was asked to rewrite: ok, or failed and used as they were written.",
            ("outcome",),
            registry=registry,
        )
        self._rejected = Counter(
            "mmgen_rejected", "Requests refused before any work, by error code.", ("reason",), registry=registry
        )
        self._cancelled = Counter("mmgen_cancelled", "Requests cancelled by the client.", registry=registry)

    def request_done(self, endpoint: str, status: int, outcome: str, seconds: float) -> None:
        """Count one answer; `outcome` wins over what the status says."""
        self._requests.labels(endpoint, self._model, outcome or outcome_of(status)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)

    def generated(self, timings: Timings, outputs: int) -> None:
        """Record the stages of one finished request."""
        self._queue_seconds.observe(timings.queue)
        for stage, seconds in (("encode", timings.encode), ("denoise", timings.denoise), ("decode", timings.decode)):
            self._stage_seconds.labels(stage).observe(seconds)
        self._step_seconds.observe(timings.per_step)
        self._outputs.inc(outputs)

    def files_encoded(self, seconds: float) -> None:
        """Record the time that pixels took to become files."""
        self._stage_seconds.labels("files").observe(seconds)

    def job_done(self, outcome: str, seconds: float) -> None:
        """Count a video job that has ended: `completed`, or the code of its error."""
        self._jobs_done.labels(outcome).inc()
        self._job_seconds.observe(seconds)

    def job_resumed(self) -> None:
        """Count a video job that goes on from a checkpoint."""
        self._jobs_resumed.inc()

    def prompt_enhanced(self, outcome: str) -> None:
        """Count a prompt that was to be rewritten: ok or failed."""
        self._enhanced.labels(outcome).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that never ran."""
        self._rejected.labels(reason).inc()

    def cancelled(self) -> None:
        """Count a request that its client gave up."""
        self._cancelled.inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


def outcome_of(status: int) -> str:
    """What an answer without an error of ours means to an operator."""
    if status == 0:  # the client left before there was an answer
        return "cancelled"
    if status < 400:
        return "ok"
    return "client_error" if status < 500 else "error"


def outcome_of_error(error: MmgenError) -> str:
    """What an error means to an operator: rejected, cancelled, client_error or error."""
    if isinstance(error, CapacityError):
        return "rejected"
    if isinstance(error, Cancelled):
        return "cancelled"
    return "client_error" if isinstance(error, UserError) else "error"


class _EngineState(Collector):
    """Reads the engine when Prometheus asks, so that nothing has to be kept up to date."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, gauges = self._engine, self._engine.gauges
        yield GaugeMetricFamily("mmgen_ready", "1 while requests are accepted.", float(engine.state == "ready"))
        yield GaugeMetricFamily(
            "mmgen_queue_depth", "Requests waiting for their first step.", engine.admitted.pictures_waiting
        )
        yield GaugeMetricFamily(
            "mmgen_queue_cost", "Token-steps of all unfinished requests.", engine.admitted.pictures_cost
        )
        yield CounterMetricFamily(
            "mmgen_worker_restarts", "Restarts of a replica, all its ranks together.", engine.restarts
        )
        ready = GaugeMetricFamily("mmgen_replica_ready", "1 while the replica takes requests.", labels=["replica"])
        cost = GaugeMetricFamily("mmgen_replica_cost", "Token-steps in the replica's hands.", labels=["replica"])
        for replica in engine.replicas:
            ready.add_metric([str(replica.number)], float(replica.state == "ready"))
            cost.add_metric([str(replica.number)], replica.cost)
        yield from (ready, cost)
        yield GaugeMetricFamily("mmgen_running", "Requests being worked on.", engine.admitted.pictures_running)
        yield GaugeMetricFamily(
            "mmgen_last_step_seconds", "The latest step of the batch.", gauges.step_seconds if gauges else 0
        )
        yield GaugeMetricFamily("mmgen_last_step_tokens", "Its tokens.", gauges.step_tokens if gauges else 0)
        loras = engine.loras
        yield GaugeMetricFamily("mmgen_lora_loaded", "Adapters in memory.", len(loras.loaded))
        yield GaugeMetricFamily("mmgen_lora_bytes", "Their tensors.", sum(info.bytes for info in loras.loaded))
        yield GaugeMetricFamily(
            "mmgen_lora_active", "Adapters that requests get.", len({p.digest for p in loras.active})
        )
        yield GaugeMetricFamily(
            "mmgen_condition_cache_bytes", "Memory of encoded prompts.", gauges.cache_bytes if gauges else 0
        )
        yield CounterMetricFamily(
            "mmgen_condition_cache_hits", "Prompts found encoded.", gauges.cache_hits if gauges else 0
        )
        yield CounterMetricFamily(
            "mmgen_condition_cache_misses", "Prompts that had to be encoded.", gauges.cache_misses if gauges else 0
        )
        yield GaugeMetricFamily(
            "mmgen_step_cache_bytes", "Memory of step caches.", gauges.step_cache_bytes if gauges else 0
        )
        yield CounterMetricFamily(
            "mmgen_cached_steps",
            "Denoising steps of finished requests that were extrapolated instead of computed.",
            gauges.cached_steps if gauges else 0,
        )


class _Memory(Collector):
    """Where the weights are at the moment of reading, of all replicas together."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, use, gauges = self._engine, self._engine.weights, self._engine.gauges
        yield GaugeMetricFamily("mmgen_asleep", "1 while the model's memory is given back.", engine.state == "asleep")
        held = GaugeMetricFamily("mmgen_weights_bytes", "Bytes of weights, by where they are.", labels=["tier"])
        for tier, size in use.tiers.items():
            held.add_metric([tier], size)
        yield held
        yield CounterMetricFamily("mmgen_weights_moved_bytes", "Weights brought onto the device.", use.moved_bytes)
        yield CounterMetricFamily("mmgen_weights_loads", "Layers and components brought there.", use.loads)
        yield CounterMetricFamily("mmgen_weights_stall_seconds", "Waiting of steps for weights.", use.stall_seconds)
        yield GaugeMetricFamily(
            "mmgen_last_step_stall_seconds",
            "Of the latest step, waiting for weights.",
            gauges.step_stall_seconds if gauges else 0,
        )


class _Cpu(Collector):
    """CPU time of this process, its workers and its helpers; of actors of a Ray cluster, Ray knows."""

    def __init__(self, engine: EngineClient) -> None:
        self._seconds = CpuSeconds(lambda: [] if engine.config.executor == "ray" else _pids(engine))

    def collect(self) -> Iterator[Metric]:
        yield self._seconds.family()


def _pids(engine: EngineClient) -> list[int]:
    return [pid for replica in engine.replicas for pid in replica.pids]


class _JobState(Collector):
    """The queue of video jobs at the moment of reading."""

    def __init__(self, jobs: JobRunner | None) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("mmgen_jobs", "Unfinished video jobs.", labels=["status"])
        family.add_metric(["queued"], self._jobs.queue.unstarted if self._jobs else 0)
        family.add_metric(["in_progress"], self._jobs.queue.started if self._jobs else 0)
        yield family
