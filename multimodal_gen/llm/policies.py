"""Which waiting request starts next. A policy orders the jobs that wait; the scheduler starts them in that order.

Nobody waits for ever, whatever comes in: who has waited for `OLD_SECONDS` goes before all that have not, in order of
arrival, and with the policy `priority` every `OLD_SECONDS` of waiting count as one priority more. Clock times are those
of the turn, so that all ranks order alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from multimodal_gen.llm.sequence import Job

OLD_SECONDS = 10.0
LPM_WINDOW = 64  # jobs, in order of arrival, whose prompts are looked up: a long queue must not cost a step


@dataclass(frozen=True)
class View:
    """What a policy may look at besides the jobs; made by the scheduler."""

    now: float  # clock time
    cached: Callable[[Job], int]  # tokens of the prompt whose KV is there
    keys: Mapping[str, int]  # routing key → sequences running


Order = tuple[float, ...]
Policy = Callable[[Sequence[Job], View], list[Job]]


def arrival(job: Job) -> Order:
    """First come, first served, within what is fair between keys."""
    return job.tag, job.number


def level(job: Job, now: float) -> int:
    """Priority, waiting counted in."""
    return job.request.priority + int((now - job.arrived) / OLD_SECONDS)


def fcfs(jobs: Sequence[Job], view: View) -> list[Job]:
    """The first that came."""
    return sorted(jobs, key=arrival)


def longest_prefix(jobs: Sequence[Job], view: View) -> list[Job]:
    """The one of whose prompt most is in the prefix cache, before that is evicted."""
    first, rest = _aged(jobs, view)
    window = sorted(rest[:LPM_WINDOW], key=lambda job: (-view.cached(job), *arrival(job)))
    return first + window + rest[LPM_WINDOW:]


def routing_key(jobs: Sequence[Job], view: View) -> list[Job]:
    """The one whose routing key most running sequences have; no key comes last."""
    first, rest = _aged(jobs, view)

    def order(job: Job) -> Order:
        key = job.request.routing_key
        return key is None, -view.keys.get(key or "", 0), *arrival(job)

    return first + sorted(rest, key=order)


def priority(jobs: Sequence[Job], view: View) -> list[Job]:
    """The highest priority."""
    return sorted(jobs, key=lambda job: (-level(job, view.now), *arrival(job)))


def _aged(jobs: Sequence[Job], view: View) -> tuple[list[Job], list[Job]]:
    """Those that have waited for long, and the others; both in order of arrival."""
    ordered = sorted(jobs, key=arrival)
    old = [job for job in ordered if view.now - job.arrived >= OLD_SECONDS]
    return old, [job for job in ordered if view.now - job.arrived < OLD_SECONDS]


POLICIES: dict[str, Policy] = {
    # --schedule-policy → order
    "fcfs": fcfs,
    "lpm": longest_prefix,
    "routing-key": routing_key,
    "priority": priority,
}
