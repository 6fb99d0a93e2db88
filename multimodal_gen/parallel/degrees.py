"""How many ranks share what. No torch here: the front refuses what cannot be before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands."""

    cfg: int
    ring: int
    ulysses: int
    tp: int


@dataclass(frozen=True)
class Degrees:
    """The sizes of one replica: world = cfg · ring · ulysses · tp.

    Ranks are numbered with tp innermost, then ulysses, then ring, then cfg:
    rank = ((cfg · R + ring) · U + ulysses) · TP + tp. So the ranks that talk most are neighbours.
    """

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    cfg: int = 1  # 1 or 2

    @property
    def sp(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses * self.ring

    @property
    def world(self) -> int:
        """All ranks of a replica."""
        return self.cfg * self.sp * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands."""
        assert 0 <= rank < self.world, f"rank {rank} of {self.world}"
        rest, tp = divmod(rank, self.tp)
        rest, ulysses = divmod(rest, self.ulysses)
        cfg, ring = divmod(rest, self.ring)
        return Coordinates(cfg=cfg, ring=ring, ulysses=ulysses, tp=tp)

    def rank(self, at: Coordinates) -> int:
        """The rank that stands there."""
        return ((at.cfg * self.ring + at.ring) * self.ulysses + at.ulysses) * self.tp + at.tp

    def __str__(self) -> str:
        named = (("tp", self.tp), ("ulysses", self.ulysses), ("ring", self.ring), ("cfg", self.cfg))
        return " x ".join(f"{name} {size}" for name, size in named if size > 1) or "one rank"
