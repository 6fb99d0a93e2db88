"""A distribution of what is there at this moment, as gauges: how many observations lie in each bucket.

A Prometheus histogram counts for ever and its buckets are cumulative: right for durations of things that are over,
wrong for things that come and go. Here each bucket is a gauge of its own, (gt, le]; all of them are told at every
reading, empty ones as 0, and nothing is kept between two readings: no series can be stale.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from prometheus_client.core import GaugeMetricFamily


@dataclass(frozen=True)
class GaugeHistogram:
    """One metric; `family` makes its series from the observations of now."""

    name: str
    help: str
    bounds: Sequence[float]
    """upper ends of the buckets but the last, which has none; finite, positive, rising"""

    def __post_init__(self) -> None:
        """Raises: ValueError for bounds that are not as they must be."""
        bounds = self.bounds
        if not bounds:
            raise ValueError(f"{self.name}: a histogram needs at least one bound")
        if not all(math.isfinite(bound) and bound > 0 for bound in bounds):
            raise ValueError(f"{self.name}: bounds must be finite and positive, these are {list(bounds)}")
        if any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"{self.name}: bounds must rise, these are {list(bounds)}")

    def counts(self, observations: Iterable[float]) -> list[int]:
        """Observations per bucket, one bucket more than bounds."""
        found = [0] * (len(self.bounds) + 1)
        for value in observations:
            found[bisect_left(self.bounds, value)] += 1
        return found

    def family(self, observations: Iterable[float]) -> GaugeMetricFamily:
        """The series of this moment, with the labels gt and le."""
        family = GaugeMetricFamily(self.name, self.help, labels=["gt", "le"])
        edges = ["-Inf", *(f"{bound:g}" for bound in self.bounds), "+Inf"]
        for (gt, le), count in zip(pairwise(edges), self.counts(observations), strict=True):
            family.add_metric([gt, le], count)
        return family
