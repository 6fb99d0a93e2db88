"""Attention of one new token per sequence on a CPU, over a dense copy of its keys and values.

Pages are scattered, and a matrix product over them begins with gathering them, which costs more than the product. So
the sequences that decode have a second, dense copy: a row of a lane, filled from the pages once and extended by every
step. Rows of one lane have room for equally many tokens and are computed together. Pages remain the truth: what is lost
here is copied again.

Keys are kept transposed, and in float32: weights are off by percents where large scores are rounded to bfloat16 before
the softmax. Behind a row's end is nothing of the sequence that had it before: numbers that overflowed there would come
through any mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from multimodal_gen.attention.paged import PagedSpan

SMALLEST = 64  # tokens of the smallest lane
STEP = 32  # scores are computed for multiples of this many tokens: few different shapes, few kernels to prepare


@dataclass
class Lane:
    """Rows for sequences of up to `room` tokens, [rows, Hkv, …] in every layer."""

    room: int
    keys: list[Tensor]  # by layer: float32 [rows, Hkv, D, room]
    values: list[Tensor]  # by layer: [rows, Hkv, room, D]
    owners: list[int] = field(default_factory=list)  # row → sequence; the first len(owners) rows are in use
    lengths: list[int] = field(default_factory=list)  # row → tokens that are there

    def row(self, owner: int, length: int) -> int | None:
        """The sequence's row, where it has exactly `length` tokens."""
        if owner not in self.owners:
            return None
        row = self.owners.index(owner)
        return row if self.lengths[row] == length else None

    def drop(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        last = len(self.owners) - 1
        if row != last:
            kept, had = self.lengths[last], self.lengths[row]
            for keys, values in zip(self.keys, self.values, strict=True):
                keys[row, :, :, :kept] = keys[last, :, :, :kept]
                values[row, :, :kept] = values[last, :, :kept]
                keys[row, :, :, kept:had] = values[row, :, kept:had] = 0.0
            self.owners[row], self.lengths[row] = self.owners[last], kept
        self.owners.pop()
        self.lengths.pop()

    def grow(self, rows: int) -> None:
        """Make room for at least `rows` rows."""
        have = len(self.keys[0])
        if rows <= have:
            return
        more = max(rows, have + have // 4) - have

        def longer(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])

        self.keys[:] = map(longer, self.keys)
        self.values[:] = map(longer, self.values)

    def shrink(self) -> None:
        """Give rows back when more than half of them are empty."""
        used = len(self.owners)
        if 2 * used < len(self.keys[0]):
            self.keys[:] = [keys[:used].clone() for keys in self.keys]
            self.values[:] = [values[:used].clone() for values in self.values]


@dataclass(frozen=True)
class LanePlan:
    """What one forward computes in one lane."""

    lane: Lane
    tokens: Tensor | None  # int64 [n]: which tokens of the batch its rows are; None: all, in order
    rows: Tensor  # int64 [n]: 0 … n - 1
    at: Tensor  # int64 [n]: where each row's new token goes
    span: int  # tokens that scores are computed for
    mask: Tensor | None  # float32 [n, 1, 1, span]: -inf behind the end of each row; None: nothing is


class DecodeWindow:
    """The dense copies of one model on one rank."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._shape = (kv_heads, head_dim)
        self._layers, self._dtype = layers, dtype
        self._lanes: dict[int, Lane] = {}

    @property
    def nbytes(self) -> int:
        """Memory that all lanes have."""
        tensors = [tensor for lane in self._lanes.values() for tensor in (*lane.keys, *lane.values)]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def token_bytes(self) -> int:
        """Memory of one token, in all layers."""
        return self._layers * math.prod(self._shape) * (4 + self._dtype.itemsize)

    def clear(self) -> None:
        """Give all memory back."""
        self._lanes.clear()

    def begin(self, spans: Sequence[PagedSpan], cache: Sequence[Tensor]) -> list[LanePlan]:
        """Bring the copies of these sequences, and of no others, to where their spans start.

        Args:
            spans: one new token each.
            cache: by layer [2, pages, Hkv, page_size, D], where what is not here yet is copied from.
        """
        wanted = {span.owner: span for span in spans}
        assert len(wanted) == len(spans), "a sequence has one new token"
        for room, lane in self._lanes.items():
            for row in reversed(range(len(lane.owners))):
                span = wanted.get(lane.owners[row])
                if span is None or room_for(span.stop) != room or lane.lengths[row] != span.start:
                    lane.drop(row)
        homes = [self._home(span, cache) for span in spans]
        self._lanes = {room: lane for room, lane in self._lanes.items() if lane.owners}
        for lane in self._lanes.values():
            lane.shrink()
        return [self._plan(lane, spans, homes) for lane in self._lanes.values()]

    def attend(self, plans: Sequence[LanePlan], layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """q [B, H, D], kv [B, 2, Hkv, D] → [B, H, D]; scale 1/√D."""
        if len(plans) == 1 and plans[0].tokens is None:
            return _attend(plans[0], layer, q, kv)
        out = torch.empty_like(q)
        for plan in plans:
            own = slice(None) if plan.tokens is None else plan.tokens
            out[own] = _attend(plan, layer, q[own], kv[own])
        return out

    def _home(self, span: PagedSpan, cache: Sequence[Tensor]) -> Lane:
        assert span.owner is not None, "only sequences that say who they are have a copy"
        lane = self._lane(room_for(span.stop))
        if lane.row(span.owner, span.start) is None:
            row = len(lane.owners)
            lane.grow(row + 1)
            lane.owners.append(span.owner)
            lane.lengths.append(span.start)
            _fill(lane, row, span, cache)
        return lane

    def _lane(self, room: int) -> Lane:
        if room not in self._lanes:
            heads, dim = self._shape
            keys = [torch.zeros(1, heads, dim, room) for _ in range(self._layers)]
            values = [torch.zeros(1, heads, room, dim, dtype=self._dtype) for _ in range(self._layers)]
            self._lanes[room] = Lane(room, keys, values)
        return self._lanes[room]

    def _plan(self, lane: Lane, spans: Sequence[PagedSpan], homes: Sequence[Lane]) -> LanePlan:
        row_of = {owner: row for row, owner in enumerate(lane.owners)}
        token_of = [0] * len(row_of)
        for token, span in enumerate(spans):
            if homes[token] is lane:
                assert span.owner is not None
                token_of[row_of[span.owner]] = token
        stops = [spans[token].stop for token in token_of]
        lane.lengths[:] = stops
        width = min(-(-max(stops) // STEP) * STEP, lane.room)
        mask = None
        if min(stops) < width:
            behind = torch.arange(width) >= torch.tensor(stops)[:, None]
            mask = torch.zeros(len(stops), width).masked_fill_(behind, -math.inf)[:, None, None]
        return LanePlan(
            lane=lane,
            tokens=None if token_of == list(range(len(spans))) else torch.tensor(token_of),
            rows=torch.arange(len(stops)),
            at=torch.tensor(stops) - 1,
            span=width,
            mask=mask,
        )


def room_for(tokens: int) -> int:
    """Tokens of the lane for sequences of this length: quarters of a power of two, so that little stays empty."""
    step = max(SMALLEST, 1 << max(0, (tokens - 1).bit_length() - 2))
    return -(-tokens // step) * step


def _fill(lane: Lane, row: int, span: PagedSpan, cache: Sequence[Tensor]) -> None:
    page_size = cache[0].shape[3]
    pages = torch.tensor(span.pages[: -(-span.start // page_size)], dtype=torch.long)
    for layer, pool in enumerate(cache):
        keys, values = pool.index_select(1, pages).transpose(1, 2).flatten(2, 3)[:, :, : span.start]  # [Hkv, L, D]
        lane.keys[layer][row, :, :, : span.start] = keys.transpose(1, 2)
        lane.values[layer][row, :, : span.start] = values
        lane.keys[layer][row, :, :, span.start :] = lane.values[layer][row, :, span.start :] = 0.0


def _attend(plan: LanePlan, layer: int, q: Tensor, kv: Tensor) -> Tensor:
    keys, values, n = plan.lane.keys[layer], plan.lane.values[layer], len(plan.rows)
    keys[plan.rows, :, :, plan.at] = kv[:, 0].float()
    values[plan.rows, :, plan.at] = kv[:, 1]
    heads, dim = kv.shape[2:]
    grouped = q.float().reshape(n * heads, -1, dim)  # neighbouring heads share keys
    scores = torch.bmm(grouped, keys[:n].flatten(0, 1)[:, :, : plan.span]).mul_(dim**-0.5)
    if plan.mask is not None:
        scores.view(n, heads, -1, plan.span).add_(plan.mask)
    weights = scores.softmax(-1).to(values.dtype)
    return torch.bmm(weights, values[:n].flatten(0, 1)[:, : plan.span]).view_as(q)
