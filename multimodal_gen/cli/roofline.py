"""`mmgen bench --roofline`: what steps cost at least on known GPUs, and what this machine makes of the same calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from multimodal_gen.cli.text import columns
from multimodal_gen.kernels.costs import OPS, Bound, Call
from multimodal_gen.pipelines.workloads import WORKLOADS


class Device(NamedTuple):
    """A processor's limits in bfloat16, and which shares of them good kernels reach."""

    name: str
    flops: float  # dense, per second
    bandwidth: float  # bytes per second
    expected: Mapping[Bound, float]  # of `flops` for products and attention, of `bandwidth` for rows


# Limits: NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM; without sparsity). Expected shares: attention as
# FlashAttention-2 was measured by Dao (2023; A100) and Shah et al. (2024; H100, whose new instructions it does not
# use); products and rows are what cuBLAS and copies commonly reach. What an H100 made of our calls is in
# docs/performance.md.
DEVICES = (
    Device("A100", 312e12, 2.039e12, {"product": 0.80, "attention": 0.65, "rows": 0.85}),
    Device("H100", 989e12, 3.35e12, {"product": 0.70, "attention": 0.38, "rows": 0.85}),
    Device("H200", 989e12, 4.8e12, {"product": 0.70, "attention": 0.38, "rows": 0.85}),
)
SHOWN = ("A100", "H100")  # in the table of what is expected

Measure = Mapping[int, float]  # index of a call → seconds that one such call took here


def floor(call: Call, device: Device) -> float:
    """Seconds that one call takes at least: the longer of computing and of moving its bytes."""
    flops, moved = call.cost()
    return max(flops / device.flops, moved / device.bandwidth)


def expected(call: Call, device: Device) -> float:
    """Seconds that one call takes with kernels that reach the device's expected shares."""
    flops, moved = call.cost()
    share = device.expected
    computing = flops / device.flops / share["attention" if OPS[call.op].bound == "attention" else "product"]
    return max(computing, moved / device.bandwidth / share["rows"])


class Total(NamedTuple):
    """Of one step on one device."""

    flops: int
    bytes: int
    floor_s: float
    expected_s: float
    share_of_peak: float  # flops of the step over what the device could do in the expected time


def total(calls: Sequence[Call], device: Device) -> Total:
    """Of all calls of a step, one after another."""
    flops = sum(call.times * call.cost().flops for call in calls)
    expected_s = sum(call.times * expected(call, device) for call in calls)
    return Total(
        flops,
        sum(call.times * call.cost().bytes for call in calls),
        sum(call.times * floor(call, device) for call in calls),
        expected_s,
        flops / (expected_s * device.flops),
    )


def known(name: str) -> Device | None:
    """The limits of a GPU by the name that its driver gives."""
    return next((device for device in DEVICES if device.name in name), None)


def run() -> dict[str, Any]:
    """Print the steps on known GPUs, measure what this machine can; returns all of it."""
    gpus = [device for device in DEVICES if device.name in SHOWN]
    print("Expected, not measured: at least (floor) and with kernels as good as others' (expected).\n")
    for workload in WORKLOADS:
        if workload.gpu:
            print(f"{workload.title}\n{columns(_expected_rows(workload.step(), gpus), '  ')}\n")
    from multimodal_gen.cli import roofline_measured

    before, on_gpu = roofline_measured.this_machine(known)
    steps = {workload.title: workload.step() for workload in WORKLOADS if workload.gpu == on_gpu}
    seconds = {title: roofline_measured.measure(calls) for title, calls in steps.items()}
    after, _ = roofline_measured.this_machine(known)
    # Others may be at work here, too: a limit is the best that was seen.
    limits = {name: max(before._asdict()[name], after._asdict()[name]) for name in ("flops", "bandwidth")}
    rates = [
        call.cost().flops / seconds[title][index]
        for title, calls in steps.items()
        for index, call in enumerate(calls)
        if OPS[call.op].bound == "product"
    ]
    here = before._replace(bandwidth=limits["bandwidth"], flops=max(limits["flops"], *rates))
    print(f"Measured on {here.name}: {here.flops / 1e12:.2f} TFLOP/s, {here.bandwidth / 1e9:.1f} GB/s (a copy).")
    print("Tensors that stay in its caches from call to call come out above that bandwidth.\n")
    for title, calls in steps.items():
        print(f"{title}\n{columns(_measured_rows(calls, seconds[title], here), '  ')}\n")
    return {
        "expected": {
            workload.title: {device.name: total(workload.step(), device)._asdict() for device in gpus}
            for workload in WORKLOADS
            if workload.gpu
        },
        "here": {"name": here.name, "flops": here.flops, "bandwidth": here.bandwidth},
        "measured": {title: _record(calls, seconds[title], here) for title, calls in steps.items()},
    }


def _expected_rows(calls: Sequence[Call], devices: Sequence[Device]) -> list[list[str]]:
    heads = [f"{device.name} {what}" for device in devices for what in ("floor", "expected")]
    rows = [["call", "op", "times", "GFLOP", "MB", *heads]]
    for call in calls:
        times = [f"{1e6 * of(call, device):.0f} us" for device in devices for of in (floor, expected)]
        rows.append([*_row(call), *times])
    totals = [total(calls, device) for device in devices]
    last = [f"{1e3 * seconds:.1f} ms" for found in totals for seconds in (found.floor_s, found.expected_s)]
    rows.append(["step", "", "", f"{totals[0].flops / 1e9:.0f}", f"{totals[0].bytes / 1e6:.0f}", *last])
    shares = [cell for found in totals for cell in ("", f"{found.share_of_peak:.0%} of peak")]
    return [*rows, ["", "", "", "", "", *shares]]


def _measured_rows(calls: Sequence[Call], seconds: Measure, here: Device) -> list[list[str]]:
    rows = [["call", "op", "times", "GFLOP", "MB", "floor", "measured", "share"]]
    for index, call in enumerate(calls):
        least, took = floor(call, here), seconds[index]
        rows.append([*_row(call), f"{1e6 * least:.0f} us", f"{1e6 * took:.0f} us", f"{least / took:.0%}"])
    found = _record(calls, seconds, here)
    step = [f"{1e3 * found['floor_s']:.1f} ms", f"{1e3 * found['measured_s']:.1f} ms", f"{found['share']:.0%}"]
    return [*rows, ["step", "", "", f"{found['flops'] / 1e9:.0f}", f"{found['bytes'] / 1e6:.0f}", *step]]


def _row(call: Call) -> list[str]:
    flops, moved = call.cost()
    return [call.what, call.op, str(call.times), f"{flops / 1e9:.1f}", f"{moved / 1e6:.1f}"]


def _record(calls: Sequence[Call], seconds: Measure, here: Device) -> dict[str, Any]:
    of_step = total(calls, here)
    measured = sum(call.times * seconds[index] for index, call in enumerate(calls))
    return {
        "flops": of_step.flops,
        "bytes": of_step.bytes,
        "floor_s": of_step.floor_s,
        "measured_s": measured,
        "share": of_step.floor_s / measured,
        "calls": [
            {"op": call.op, "what": call.what, "times": call.times, **call.sizes, "seconds": seconds[index]}
            for index, call in enumerate(calls)
        ],
    }
