"""How fast this machine computes and reads, measured in some tenths of a second before a model is loaded."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from multimodal_gen.memory.describe import describe
from multimodal_gen.memory.estimate import Load, Rates, StepCost, step_cost
from multimodal_gen.memory.plan import MemoryPlan, Sizes

BUDGET = 0.05  # seconds for each of the measurements
COPY_BYTES = 32 << 20
READ_BYTES = 8 << 20
SIDE = 1024  # of the square matrices that are multiplied


def rates(device: torch.device, dtype: torch.dtype, files: Sequence[Path]) -> Rates:
    """Of this machine. `files` are the model's; the largest is read from."""
    pageable = copies(device, pinned=False)
    pinned = copies(device, pinned=True) if device.type == "cuda" else pageable
    return Rates(flops=products(device, dtype), pinned=pinned, pageable=pageable, file=reads(files, pageable))


def products(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square product."""
    side = SIDE * 4 if device.type == "cuda" else SIDE
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds, count = _timed(device, lambda: torch.mm(a, b))
    return 2 * side**3 * count / seconds


def copies(device: torch.device, *, pinned: bool) -> float:
    """Bytes per second from memory of the host to the device; on a CPU, within memory."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    seconds, count = _timed(device, lambda: target.copy_(source, non_blocking=True))
    return COPY_BYTES * count / seconds


def reads(files: Sequence[Path], memory: float) -> float:
    """Bytes per second of the disk that holds the largest of `files`, around the page cache where that is possible.

    Args:
        memory: what to say where there is nothing to read.
    """
    largest = max(files, key=lambda file: file.stat().st_size, default=None)
    if largest is None or largest.stat().st_size < READ_BYTES:
        return memory
    try:
        file = os.open(largest, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # a file system that cannot
        file = os.open(largest, os.O_RDONLY)
    try:
        return _read(file, largest.stat().st_size // READ_BYTES) or memory
    except OSError:  # a disk that fails is the loader's to report
        return memory
    finally:
        os.close(file)


def _read(file: int, blocks: int) -> float:
    """Bytes per second; 0 for a file that ends early, which is the loader's to report."""
    target = mmap.mmap(-1, READ_BYTES)  # page-aligned, as reading around the cache wants it
    done, begin = 0, time.perf_counter()
    while True:
        count = os.preadv(file, [target], done // READ_BYTES % blocks * READ_BYTES)
        done += count
        seconds = time.perf_counter() - begin
        if count < READ_BYTES or seconds > BUDGET:
            return done / seconds if count == READ_BYTES else 0.0


def _timed(device: torch.device, work: Callable[[], object]) -> tuple[float, int]:
    """(seconds, how often)"""
    work()  # the first time, memory is faulted in and a kernel is chosen
    _finish(device)
    count, begin = 0, time.perf_counter()
    while True:
        work()
        _finish(device)
        count, seconds = count + 1, time.perf_counter() - begin
        if seconds > BUDGET:
            return seconds, count


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def preflight(
    plan: MemoryPlan,
    sizes: Sequence[Sizes],
    load: Load | None,
    files: Sequence[Path],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[str], StepCost | None]:
    """What to tell before loading, and what a step will cost where layers stream.

    Args:
        load: of a typical request; None where that is not known, and nothing is measured then.
        files: of the model.
    """
    cost = None
    if load is not None and plan.slots:
        cost = step_cost(plan, sizes, load, rates(device, dtype, files), dtype.itemsize)
    return describe(plan, sizes, str(device), None if cost is None else cost.slowdown), cost
