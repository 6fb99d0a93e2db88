"""A plan in words, for the log before loading and for `mmgen doctor`. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from multimodal_gen.memory.shares import MemoryPlan, Share, Sizes
from multimodal_gen.units import size

_DOING = {"encode": "encoding", "denoise": "denoising", "decode": "decoding"}


def describe(plan: MemoryPlan, sizes: Sequence[Sizes], device: str, slowdown: float | None = None) -> list[str]:
    """One line for every component, one for each tier that is used, and the peak.

    Args:
        slowdown: of a step, as `estimate.StepCost` tells; None: unknown.
    """
    width = max(len(part.name) for part in sizes) + 2
    lines = [f"{part.name:<{width}}{_share(part, plan.shares[part.name])}" for part in sizes]
    away = sum(part.total - plan.shares[part.name].held(part) for part in sizes)
    if away:
        if plan.slots:
            lines.append(f"{'ring':<{width}}{plan.slots} slots of {size(plan.slot_bytes)} for layers on their way")
        lines.append(f"{'host':<{width}}{_host(plan, away, device)}")
    return [*lines, peak_line(plan, slowdown)]


def peak_line(plan: MemoryPlan, slowdown: float | None = None) -> str:
    """The last line: `peak 11.2 GB of 24.0 GB, est. +6 % per step`."""
    within = "" if plan.limit_bytes is None else f" of {size(plan.limit_bytes)}"
    cost = "" if slowdown is None else f", est. +{slowdown * 100:.0f} % per step"
    return f"peak {size(plan.peak_bytes)}{within}{cost}"


def _share(part: Sizes, share: Share) -> str:
    if share.residency == "resident":
        return f"resident, {size(part.total)}"
    if share.residency == "parked":
        return f"parked, {size(part.total)} while {_DOING.get(part.stage, part.stage)}"
    layers = len(part.layers)
    passing = share.streamed(part)
    return f"streamed, {layers - len(passing)} of {layers} layers resident, {size(max(passing))} per layer"


def _host(plan: MemoryPlan, away: int, device: str) -> str:
    if device.partition(":")[0] == "cpu":
        return f"{size(away)} read from files, of which the page cache may keep {size(plan.host_bytes)}"
    tiers = (
        (plan.pinned_bytes, "page-locked"),
        (plan.host_bytes - plan.pinned_bytes, "in RAM"),
        (away - plan.host_bytes, "read from files"),
    )
    return ", ".join(f"{size(count)} {where}" for count, where in tiers if count)
