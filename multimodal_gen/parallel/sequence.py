"""Sequence parallelism: a packed batch cut into equal slices of tokens, and attention that sees all of them.

Everything but attention works on tokens one by one, so a rank runs the model on its slice. Attention needs the others:

- Ulysses (Jacobs et al., 2023): an all-to-all swaps tokens for heads, every rank attends with all tokens of its heads,
  and another swaps back. Sends 4 · N · d / P · (P - 1) / P numbers per layer and rank.
- Ring (Liu et al., 2023): keys and values travel around, blocks of attention are joined by their log-sum-exp in
  float32. Sends 2 · N · d / P · (P - 1) numbers, needs no heads, and overlaps with the computation.
- USP (Fang and Zhao, 2024): Ulysses among neighbours, ring among those groups.

Shapes: T tokens of the batch, P ranks, n = ⌈T / P⌉ tokens of a slice (the last ones are padding, which belongs to no
segment and is never attended to), H heads, D head width, U and R ranks of the Ulysses and of the ring group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.attention import registry
from multimodal_gen.attention.base import AttentionBackend, LseBackend
from multimodal_gen.attention.segments import Segments
from multimodal_gen.kernels.ring_merge import ring_merge_
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.parallel.mesh import Mesh

Item = TypeVar("Item")


@dataclass(frozen=True)
class LocalSegments(Segments):
    """A slice's share of the segments, padding counted to the last one: what works on tokens one by one needs no more.

    `lengths` are those of the slice and add up to n.
    """

    whole: Segments = field(default_factory=lambda: Segments(()))  # of the whole batch; for attention
    indices: tuple[int, ...] = ()  # which segments of the whole batch these are

    def pick(self, items: Sequence[Item]) -> list[Item]:
        """The items of these segments, from one item per segment of the whole batch."""
        return [items[index] for index in self.indices]


@dataclass(frozen=True)
class TokenShards:
    """T tokens shared out among the ranks of a group, each with a slice of n."""

    total: int
    group: Group = SOLO

    @property
    def length(self) -> int:
        """n."""
        return -(-self.total // self.group.size)

    def split(self, x: Tensor) -> Tensor:
        """x [T, ...] → this rank's slice [n, ...], padded with zeros."""
        if self.group.size == 1:
            return x
        start = self.group.rank * self.length
        mine = x[start : start + self.length]
        return _padded(mine, self.length)

    def gather(self, x: Tensor) -> Tensor:
        """Slices [n, ...] of all ranks → [T, ...] on every rank."""
        return self.group.all_gather(x)[: self.total]

    def pick(self, x: Tensor, positions: Tensor) -> Tensor:
        """Slices [n, ...] of all ranks → [positions, ...] on every rank: these tokens of the whole batch."""
        if self.group.size == 1:
            return x[positions]
        own = positions - self.group.rank * self.length
        here = (own >= 0) & (own < self.length)
        found = x.new_zeros(len(positions), *x.shape[1:])
        found[here] = x[own[here]]
        return self.group.all_reduce_(found)  # each of them is on one rank: the sum is exact

    def local(self, segments: Segments) -> LocalSegments:
        """The slice's share of segments over these T tokens."""
        assert segments.total == self.total, f"segments of {segments.total} tokens for {self.total}"
        start = self.group.rank * self.length
        lengths = segments.within(start, start + self.length)
        indices = [index for index, length in enumerate(lengths) if length] or [len(lengths) - 1]
        mine = [lengths[index] for index in indices]
        mine[-1] += self.length - sum(mine)
        return LocalSegments(tuple(mine), segments, tuple(indices))


def choose_attention(name: str, device: torch.device, mesh: Mesh) -> AttentionBackend:
    """The named backend (or `auto`), over the ranks that share a sequence. Raises: ConfigError listing what can run."""
    if mesh.ring.size > 1:
        return RingAttention(registry.choose_with_lse(name, device), mesh.ulysses, mesh.ring)
    local = registry.choose(name, device)
    return UlyssesAttention(local, mesh.ulysses) if mesh.ulysses.size > 1 else local


class UlyssesAttention:
    """Attention of the whole batch for ranks that hold a slice each; segments that are not sliced stay local."""

    def __init__(self, local: AttentionBackend, ulysses: Group) -> None:
        self.name = local.name  # recipes hold it, and ask for it again wherever they are replayed
        self._local = local
        self._ulysses = ulysses

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v [n, H, D] with LocalSegments → [n, H, D]. Raises: PeerLost."""
        if not isinstance(segments, LocalSegments):
            return self._local(q, k, v, segments)
        q, k, v = _tokens_for_heads(self._ulysses, q, k, v)  # [P · n, H / P, D]
        total = segments.whole.total
        out = self._local(q[:total], k[:total], v[:total], segments.whole)
        return _heads_for_tokens(self._ulysses, _padded(out, len(q)))


class RingAttention:
    """The same over a ring, with Ulysses among the neighbours of each of its stations."""

    def __init__(self, local: LseBackend, ulysses: Group, ring: Group) -> None:
        self.name = local.name
        self._local = local
        self._ulysses, self._ring = ulysses, ring

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v [n, H, D] with LocalSegments → [n, H, D]. Raises: PeerLost."""
        if not isinstance(segments, LocalSegments):
            return self._local(q, k, v, segments)
        q, k, v = _tokens_for_heads(self._ulysses, q, k, v)  # [C, H / U, D], C = U · n tokens of a station
        out = self._around(q, torch.stack([k, v]), segments.whole)
        return _heads_for_tokens(self._ulysses, _padded(out, len(q)))

    def _around(self, q: Tensor, block: Tensor, whole: Segments) -> Tensor:
        """q [C, H, D], block [2, C, H, D]: this station's keys and values → [its real tokens, H, D]."""
        ring, station = self._ring, len(q)
        mine = whole.within(ring.rank * station, (ring.rank + 1) * station)
        joined = _Joined(q[: sum(mine)])
        for hop in range(ring.size):
            arriving = ring.start_shift(block) if hop + 1 < ring.size else None
            source = (ring.rank - hop) % ring.size
            theirs = whole.within(source * station, (source + 1) * station)
            self._attend(joined, block, mine, theirs)
            block = arriving.wait() if arriving is not None else block
        return joined.out.to(q.dtype)

    def _attend(self, joined: _Joined, block: Tensor, mine: Sequence[int], theirs: Sequence[int]) -> None:
        """Add what `joined.q` sees of a block; lengths are per segment of the whole batch, most of them 0."""
        first = next((index for index, length in enumerate(mine) if length), 0)
        last = next((len(mine) - index for index, length in enumerate(reversed(mine)) if length), 0)
        seen = theirs[first:last]
        if not sum(seen):
            return
        start = sum(theirs[:first])
        k, v = block[:, start : start + sum(seen)]
        joined.add(*self._local.with_lse(joined.q, k, v, Segments.of(mine[first:last]), Segments.of(seen)))


class _Joined:
    """Attention over the blocks so far, in float32: a softmax-weighted mean and the log of its weights' sum."""

    def __init__(self, q: Tensor) -> None:
        self.q = q
        self.out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        self.lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Join a block."""
        ring_merge_(self.out, self.lse, out, lse)


def _padded(x: Tensor, length: int) -> Tensor:
    """x [t, ...] → [length, ...] with zeros at the end."""
    missing = length - len(x)
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


def _tokens_for_heads(group: Group, *tensors: Tensor) -> list[Tensor]:
    """[n, H, D] each: n tokens of all heads → [P · n, H / P, D] each: all tokens of some heads."""
    if group.size == 1:
        return list(tensors)
    by_rank = [x.unflatten(1, (group.size, -1)).movedim(1, 0) for x in tensors]  # [P, n, H / P, D] each
    x = group.all_to_all(torch.stack(by_rank, dim=2))  # [P, n, tensors, H / P, D]
    return list(x.flatten(0, 1).unbind(1))


def _heads_for_tokens(group: Group, x: Tensor) -> Tensor:
    """[P · n, H / P, D] → [n, H, D]."""
    if group.size == 1:
        return x
    x = group.all_to_all(x.unflatten(0, (group.size, -1)))  # [P heads, n, H / P, D]
    return x.movedim(0, 1).flatten(1, 2)
