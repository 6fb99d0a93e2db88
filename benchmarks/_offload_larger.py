"""Part `larger` of `offload.py`: a model whose weights are three times the memory that they are allowed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _common import Numbers, Side, SideEnded, interleave, ratio, rounded, say, spread
from _disk import bandwidth, drop_cache
from _limit import limited
from _models import prompt
from _offload_peers import RESIDENT, STREAMED
from _watch import Watch, disk_bytes

SHARE = 3  # weights over allowed memory
MARGIN_MB = 300  # that streaming may need beyond its formula


@dataclass
class Runner:
    """One process and what was measured of it; filled by `steps`."""

    side: Side
    watch: Watch
    pid: int
    seconds: dict[int, list[float]] = field(default_factory=dict)  # size → of its steps
    peaks: dict[int, Numbers] = field(default_factory=dict)  # size → memory, of the smallest with that of loading
    counters: dict[int, Numbers] = field(default_factory=dict)  # size → per step

    def warm(self, size: int) -> None:
        """A step that does not count: all requests have the same prompt, so no encoder stands before the others."""
        self.steps(size, 1)
        self.seconds.clear()

    def steps(self, size: int, count: int, save: Path | None = None) -> None:
        """One request without guidance. Raises: SideEnded; SystemExit for a request that failed."""
        begin = disk_bytes(self.pid)
        answer = self.side.run(
            do="steps",
            prompt=prompt(0),
            seed=1,
            width=size,
            height=size,
            num_inference_steps=count,
            guidance_scale=0.0,
            save=None if save is None else str(save),
        )
        if "error" in answer:
            raise SystemExit(answer["error"])
        read = disk_bytes(self.pid) - begin
        clock = [answer["begin"], *answer["ends"]]
        self.seconds.setdefault(size, []).extend(later - earlier for earlier, later in pairwise(clock))
        peak = self.watch.since()
        self.peaks[size] = {name: max(value, self.peaks.get(size, {}).get(name, 0)) for name, value in peak.items()}
        self.counters[size] = {
            "weights_mb": rounded(answer.get("moved_bytes", 0) / 1e6),
            "disk_mb": rounded(read / count / 1e6),
            "stall_s": rounded(answer.get("stall_seconds", 0)),
        }


def larger(model: Path, flags: argparse.Namespace, folder: Path) -> Numbers:
    """All of the part."""
    options = {"model": str(model), "dtype": flags.dtype, "threads": flags.threads, "place": str(folder)}
    weights = sum(file.stat().st_size for file in model.rglob("*.safetensors"))
    (main_file,) = (model / "transformer").glob("*.safetensors")
    base, data = _base(options)
    found: Numbers = {"weights_mb": rounded(weights / 1e6), "allowed_mb": rounded(weights / SHARE / 1e6), "base": base}
    with ExitStack() as stack:
        resident = _start(stack, options, "ours", RESIDENT)
        loaded = resident.watch.since() and resident.watch.now()
        drop_cache(model)
        limit = stack.enter_context(limited(int(base["pss_mb"] * 1e6), data, weights // SHARE))
        found["limit"] = {"kind": limit.kind, "mb": rounded(limit.nbytes / 1e6)}
        say(f"{limit.kind}: {limit.nbytes / 1e6:.0f} MB")
        with ExitStack() as inner:
            streamed = _start(inner, options, "ours", STREAMED, limit.inside)
            facts = streamed.side.run(do="facts")
            found["plan"] = {name: facts[name] for name in ("shares", "slots", "slot_bytes")}
            try:
                for runner in (resident, streamed):
                    runner.warm(flags.small)
                for size, rounds in ((flags.small, flags.repeats), (flags.large, 1)):
                    found[f"at_{size}"] = _at(size, resident, streamed, main_file, folder, rounds, flags)
            except SideEnded as ended:
                found["failed"] = f"streamed: {ended}"
            found["group_peak_mb"] = None if limit.peak() is None else rounded((limit.peak() or 0) / 1e6)
        found["memory"] = _memory(base, loaded, resident, streamed, facts)
        say("diffusers in the same limit")
        drop_cache(model)
        found["diffusers_in_the_limit"] = _peer(options, limit.inside, flags)
    return found


def _start(
    stack: ExitStack, options: Numbers, kind: str, mode: Numbers, inside: Callable[[], None] | None = None
) -> Runner:
    pids: list[int] = []
    watch = stack.enter_context(Watch())

    def start(pid: int) -> None:
        pids.append(pid)
        watch.start(pid)

    side = Side(script="_offload_side.py", inside=inside, watch=start, kind=kind, mode=mode, **options)
    stack.enter_context(side)
    if "error" in side.hello:
        raise SystemExit(side.hello["error"])
    return Runner(side, watch, pids[0])


def _base(options: Numbers) -> tuple[Numbers, int]:
    """Memory of a process that only imports, and the bytes of its data segments."""
    with ExitStack() as stack:
        runner = _start(stack, options, "imports", {})
        return runner.watch.now(), int(runner.side.run(do="facts")["data_bytes"])


def _at(
    size: int, resident: Runner, streamed: Runner, file: Path, folder: Path, rounds: int, flags: argparse.Namespace
) -> Numbers:
    """Seconds per step at one size against resident and the floor.

    The disk is measured before and after the streamed steps of every round: virtual disks have bursts.
    """
    steps = flags.steps if size == flags.small else flags.large_steps
    saves = {name: folder / f"{name}-{size}.npy" for name in ("resident", "streamed")}
    took_turns = interleave(
        {
            "resident": lambda _: resident.steps(size, steps, saves["resident"]),
            "disk before": lambda _: bandwidth(file),
            "streamed": lambda _: streamed.steps(size, steps, saves["streamed"]),
            "disk after": lambda _: bandwidth(file),
        },
        rounds,
        flags.max_seconds,
    )
    speeds = [*took_turns["disk before"], *took_turns["disk after"]]
    took, free = streamed.seconds[size], resident.seconds[size]
    compute = median(free)
    reading = streamed.counters[size]["disk_mb"] * 1e6 / median(speeds)  # some may be cached: less than what passes
    floor = max(compute, reading)
    return {
        "bound_by": "compute" if compute > reading else "disk",
        "resident_step_s": spread(free),
        "streamed_step_s": spread(took),
        "bandwidth_gb_s": spread([speed / 1e9 for speed in speeds]),
        "reading_s": rounded(reading),
        "floor_s": rounded(floor),
        "over_floor": {name: rounded(of / floor) for name, of in (("median", median(took)), ("max", max(took)))},
        "over_resident": ratio(took, free),
        "per_step": streamed.counters[size],
        "bit_equal": bool(np.array_equal(*(np.load(save) for save in saves.values()))),
    }


def _memory(base: Numbers, loaded: Numbers, resident: Runner, streamed: Runner, facts: Numbers) -> Numbers:
    """Peak anonymous memory of the streamed process and what its formula allows."""
    rest = sum(part["rest"] for part in facts["parts"]) / 1e6
    ring = facts["slots"] * facts["slot_bytes"] / 1e6
    work = max(peak["anon_mb"] for peak in resident.peaks.values()) - loaded["anon_mb"]
    peak = max(peaks["anon_mb"] for peaks in streamed.peaks.values())
    needed = base["anon_mb"] + rest + ring + work
    return {
        "peak_anon_mb": peak,
        "peak_file_mb": max(peaks["file_mb"] for peaks in streamed.peaks.values()),
        "imports_mb": base["anon_mb"],
        "rest_mb": rounded(rest),
        "ring_mb": rounded(ring),
        "activations_mb": rounded(work),
        "allowed_anon_mb": rounded(needed + MARGIN_MB),
        "beyond_formula_mb": rounded(peak - needed),
        "resident_peak_anon_mb": max(peaks["anon_mb"] for peaks in resident.peaks.values()),
    }


def _peer(options: Numbers, inside: Callable[[], None], flags: argparse.Namespace) -> Numbers:
    """diffusers without offload, whose weights are mapped files: what the kernel drops it reads again."""
    with ExitStack() as stack:
        try:
            runner = _start(stack, options, "diffusers", {}, inside)
            runner.warm(flags.small)
            runner.steps(flags.small, 2)
        except (SideEnded, SystemExit) as ended:
            return {"failed": str(ended)}
        found: dict[str, Any] = {
            "step_s": spread(runner.seconds[flags.small]),
            "per_step": runner.counters[flags.small],
        }
        return found | {f"peak_{name}": value for name, value in runner.peaks[flags.small].items()}
