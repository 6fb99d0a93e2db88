"""Gauges of what is there now: buckets that do not add up, bounds that are checked, nothing left of before."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from multimodal_gen.observe.gauge_histogram import GaugeHistogram

pytestmark = [pytest.mark.unit]

HISTOGRAM = GaugeHistogram("some_requests", "Of something.", (1, 2, 5, 10))


def shown(family: GaugeMetricFamily) -> dict[tuple[str, str], float]:
    return {(sample.labels["gt"], sample.labels["le"]): sample.value for sample in family.samples}


def test_every_observation_is_in_exactly_one_bucket() -> None:
    rng = random.Random(1)
    for _ in range(200):
        values = [rng.choice([0.5, 1, 1.5, 2, 3, 5, 7, 10, 11, 1e9]) for _ in range(rng.randrange(30))]
        edges = [-math.inf, *HISTOGRAM.bounds, math.inf]
        expected = [sum(low < value <= high for value in values) for low, high in pairwise(edges)]
        assert HISTOGRAM.counts(values) == expected
        assert sum(expected) == len(values)


def test_a_bucket_that_empties_is_told_as_zero() -> None:
    before = shown(HISTOGRAM.family([1, 3, 100]))
    assert before == {("-Inf", "1"): 1, ("1", "2"): 0, ("2", "5"): 1, ("5", "10"): 0, ("10", "+Inf"): 1}
    assert shown(HISTOGRAM.family([])) == dict.fromkeys(before, 0)


def test_prometheus_can_read_it() -> None:
    class Collector:
        def collect(self) -> list[GaugeMetricFamily]:
            return [HISTOGRAM.family([4])]

    registry = CollectorRegistry()
    registry.register(Collector())  # type: ignore[arg-type]
    assert b'some_requests{gt="2",le="5"} 1.0\n' in generate_latest(registry)


@pytest.mark.parametrize(
    ("bounds", "why"),
    [
        ((), "at least one"),
        ((0, 1), "positive"),
        ((-1, 1), "positive"),
        ((1, math.inf), "finite"),
        ((1, math.nan), "finite"),
        ((1, 1), "rise"),
        ((2, 1), "rise"),
    ],
)
def test_bounds_that_make_no_buckets_are_refused(bounds: tuple[float, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        GaugeHistogram("some_requests", "Of something.", bounds)
