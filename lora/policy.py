"""`merge_mode: auto`: when adapters are merged into the weights, and when they run beside them. No torch here.

Merged adapters cost nothing per step, but weights hold one set at a time: requests with another set wait for those that
run. Beside the weights, every row may have its own set, for a small price per step, and no update is lost to rounding.

The choice for a set, in this order:
1. It holds updates that exist only merged (DoRA, LoHa, LoKr, whole differences): merged.
2. Rounding to the weights' dtype would lose more than `MAX_LOSS` of the update, or the weights are held in fewer bits:
   beside.
3. Else merged, as long as one set dominates: when a quarter of the last 16 requests wanted other adapters than the
   active ones, beside; when 16 in a row wanted the active ones, merged again. `--deterministic` leaves out rule 3,
   because the two ways round differently.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

MAX_LOSS = 0.5
WINDOW = 16
MIXED = 4


@dataclass(frozen=True)
class Choice:
    """How a set is applied to one tree."""

    merged: bool
    reason: str
    settled: bool = True  # traffic does not change it


def choose(mode: str, merge_only: str, loss: float, exact: bool = True) -> Choice:
    """For a set on one tree.

    Args:
        mode: "auto", "merge" or "dynamic"; "dynamic" with `merge_only` is refused before.
        merge_only: why it exists only merged, or an empty string.
        loss: see `merge.rounding_loss`.
        exact: whether weights are computed with in the bits of their dtype.
    """
    if mode != "auto":
        return Choice(mode == "merge", f"asked for with merge_mode {mode!r}")
    if merge_only:
        return Choice(True, f"exists only merged: {merge_only}")
    if not exact:
        return Choice(False, "the weights are held in fewer bits, which would lose much of the update")
    if loss > MAX_LOSS:
        return Choice(False, f"rounding would lose {loss:.0%} of the update")
    return Choice(True, "one set dominates", settled=False)


@dataclass
class Traffic:
    """Which adapters the last requests wanted."""

    others: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))  # filled by note

    def note(self, other: bool) -> None:
        """A request arrived; `other`: it wants not the active adapters."""
        self.others.append(other)

    def merged(self, now: bool) -> bool:
        """Whether the active set should be merged from now on."""
        if now:
            return sum(self.others) < MIXED
        return len(self.others) == WINDOW and not any(self.others)
