"""All groups that one rank belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from multimodal_gen.parallel.degrees import Coordinates, Degrees
from multimodal_gen.parallel.group import LOOPBACK, SOLO, Group, Meeting

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_KEYS: dict[str, Callable[[Coordinates], tuple[int, ...]]] = {
    # Ranks with equal keys belong to one group.
    "world": lambda at: (),
    "tp": lambda at: (at.cfg, at.ring, at.ulysses),
    "ulysses": lambda at: (at.cfg, at.ring, at.tp),
    "ring": lambda at: (at.cfg, at.ulysses, at.tp),
    "sp": lambda at: (at.cfg, at.tp),
    "cfg": lambda at: (at.ring, at.ulysses, at.tp),
}
CPU = torch.device("cpu")


class _Nobody:
    """Collectives of a group whose other ranks do not exist."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AssertionError(f"{name}: this rank is imagined")


@dataclass(frozen=True)
class Mesh:
    """One rank's place in a replica. Groups of one are `SOLO`; groups of the same ranks are the same object."""

    degrees: Degrees
    rank: int
    world: Group
    control: Group  # all ranks, on the CPU whatever the device: small messages, beside the model's own traffic
    tp: Group
    ulysses: Group
    ring: Group
    sp: Group  # ulysses x ring: slice i of a sequence belongs to rank i
    cfg: Group
    loading: int = field(default=1, kw_only=True)  # replicas that load now, this one included; filled by the worker

    @classmethod
    def solo(cls) -> Mesh:
        """One rank that does everything."""
        return cls(Degrees(), 0, *([SOLO] * 7))

    @classmethod
    def imagined(cls, degrees: Degrees) -> Mesh:
        """Rank 0 of a replica whose other ranks do not exist: to know the sizes of its share, not to compute."""
        groups: dict[str, Any] = {
            name: Group(0, size, _Nobody(), CPU) if size > 1 else SOLO
            for name, size in (
                *(("world", degrees.world), ("tp", degrees.tp), ("ulysses", degrees.ulysses)),
                *(("ring", degrees.ring), ("sp", degrees.sp), ("cfg", degrees.cfg), ("control", degrees.world)),
            )
        }
        return cls(degrees, 0, **groups)

    @classmethod
    def connect(
        cls,
        degrees: Degrees,
        rank: int,
        store: Store,
        device: torch.device,
        timeout_s: float,
        address: str = LOOPBACK,
    ) -> Mesh:
        """Meet the other ranks of the replica.

        Args:
            store: one for all ranks of the replica, fresh for every start; a FileStore on one host, a TCPStore across.
            device: where the model's tensors are: gloo for the CPU, NCCL for CUDA, whose current device it has to be.
            timeout_s: how long an operation may wait for a rank that does not answer.
            address: where this rank listens; the default is for ranks of one host, which nobody else can reach.

        Raises: PeerLost when some rank does not come in time.
        """
        if degrees.world == 1:
            return cls.solo()
        meeting = Meeting(store, timeout_s, address)
        made: dict[tuple[int, ...], Group] = {}
        groups: dict[str, Any] = {}
        for name, key in _KEYS.items():
            own = key(degrees.coordinates(rank))
            ranks = tuple(r for r in range(degrees.world) if key(degrees.coordinates(r)) == own)
            if len(ranks) == 1:
                groups[name] = SOLO
                continue
            if ranks not in made:
                label = f"{name}/{ranks[0]}"
                made[ranks] = Group.connect(ranks.index(rank), len(ranks), meeting, device, label)
            groups[name] = made[ranks]
        control = Group.connect(rank, degrees.world, meeting, CPU, "control")
        return cls(degrees, rank, control=control, **groups)

    @property
    def groups(self) -> dict[str, Group]:
        """Every distinct group that communicates, by the first of its names."""
        named = (("control", self.control), *((name, vars(self)[name]) for name in _KEYS))
        found: dict[str, Group] = {}
        for name, group in named:
            if group is not SOLO and group not in found.values():
                found[name] = group
        return found
