"""`kernels/sampling.py` in Triton: a program per row, which reads its logits again and again from the second cache.

Nothing is sorted. The weight that a candidate must reach is the largest one of which enough candidates stand at or
above it, or enough of their sum; its bits are found by halving the range between two weights thirty times, since floats
above zero are in the order of their bits. Sums of tiles are float32, sums over tiles float64.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multimodal_gen.kernels.sampling import Wishes

TILE = 1024
ONE = 0x3F800000  # the bits of 1.0, the weight of the best candidate
HALVINGS = 30  # ONE < 2³⁰


@triton.jit
def _weights(row_ptr, start, count, top, temperature, tile: tl.constexpr):
    at = start + tl.arange(0, tile)
    logits = tl.load(row_ptr + at, mask=at < count, other=float("-inf"))
    return tl.exp((logits - top) / temperature)


@triton.jit
def _above(row_ptr, count, top, temperature, least, tile: tl.constexpr):
    """(how many weights reach `least`, their sum)."""
    many, total = tl.zeros((), tl.int32), tl.zeros((), tl.float64)
    for start in range(0, count, tile):
        weights = _weights(row_ptr, start, count, top, temperature, tile)
        # Behind the end of the row weights are 0, which a limit of 0 does not keep out.
        inside = (weights >= least) & (start + tl.arange(0, tile) < count)
        many += tl.sum(inside.to(tl.int32), 0)
        total += tl.sum(tl.where(inside, weights, 0.0), 0).to(tl.float64)
    return many, total


@triton.jit
def _sample(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniform_ptr,
    ids_ptr,
    count,
    one: tl.constexpr,
    halvings: tl.constexpr,
    tile: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * count
    temperature = tl.load(temperature_ptr + row)
    k, p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    least = tl.load(min_p_ptr + row)
    k = tl.where(k < count, k, 0)

    best = tl.full((tile,), float("-inf"), tl.float32)
    for start in range(0, count, tile):
        at = start + tl.arange(0, tile)
        best = tl.maximum(best, tl.load(row_ptr + at, mask=at < count, other=float("-inf")))
    top = tl.max(best, 0)

    found = tl.zeros((), tl.float32)
    if k > 0:
        low, high = tl.zeros((), tl.int32), tl.full((), one + 1, tl.int32)  # low keeps at least k, high fewer
        for _ in range(halvings):
            middle = (low + high) // 2
            many, _sum = _above(row_ptr, count, top, temperature, middle.to(tl.float32, bitcast=True), tile)
            low = tl.where(many >= k, middle, low)
            high = tl.where(many >= k, high, middle)
        found = low.to(tl.float32, bitcast=True)
    if p < 1.0:
        _many, whole = _above(row_ptr, count, top, temperature, found, tile)
        wanted = p * whole
        low, high = found.to(tl.int32, bitcast=True), tl.full((), one + 1, tl.int32)
        for _ in range(halvings):
            middle = (low + high) // 2
            _count, held = _above(row_ptr, count, top, temperature, middle.to(tl.float32, bitcast=True), tile)
            low = tl.where(held >= wanted, middle, low)
            high = tl.where(held >= wanted, high, middle)
        found = low.to(tl.float32, bitcast=True)
    least = tl.maximum(least, found)

    _many, whole = _above(row_ptr, count, top, temperature, least, tile)
    target = tl.load(uniform_ptr + row) * whole
    # The tile in which the running sum passes the target, or the last one that has any weight.
    passed, chosen, before = tl.zeros((), tl.float64), tl.zeros((), tl.int32), tl.zeros((), tl.float64)
    done = tl.zeros((), tl.int32)
    for start in range(0, count, tile):
        weights = _weights(row_ptr, start, count, top, temperature, tile)
        held = tl.sum(tl.where(weights >= least, weights, 0.0), 0).to(tl.float64)
        take = (done == 0) & (held > 0)
        chosen = tl.where(take, start, chosen)
        before = tl.where(take, passed, before)
        passed += held
        done = tl.where(passed > target, 1, done)
    weights = _weights(row_ptr, chosen, count, top, temperature, tile)
    weights = tl.where(weights >= least, weights, 0.0)
    running = tl.cumsum(weights.to(tl.float64), 0)
    over = (running > target - before) & (weights > 0)
    # Sums of a tile in two orders may differ in their last bits: then it is the last candidate.
    at = tl.arange(0, tile)
    first = tl.min(tl.where(over, at, tile), 0)
    last = tl.max(tl.where(weights > 0, at, 0), 0)
    tl.store(ids_ptr + row, (chosen + tl.where(first < tile, first, last)).to(tl.int64))


def sample(logits: Tensor, wishes: Wishes) -> Tensor:
    """Arguments as checked by `kernels.sampling`."""
    logits = logits.contiguous()
    ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    tile = min(TILE, triton.next_power_of_2(logits.shape[1]))
    if len(logits):
        _sample[(len(logits),)](
            logits,
            wishes.temperature,
            wishes.top_k,
            wishes.top_p,
            wishes.min_p,
            wishes.uniform,
            ids,
            logits.shape[1],
            one=ONE,
            halvings=HALVINGS,
            tile=tile,
        )
    return ids
