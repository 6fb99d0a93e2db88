"""Which adapters compute in the next step, where texts use more of them than one step may hold. No torch here.

All texts that were admitted are in; those whose adapter has no turn wait for some steps with all they have. The base
model is an adapter like the others: it takes a place and gets turns. All of it follows from the order of calls alone,
so the ranks of a replica decide alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

Adapter = str | None
"""a digest; None is the base model"""

TURN_STEPS = 8
"""steps before an adapter that others wait for gives its place up; fewer would load factors more often than use them"""


class AdapterTurns:
    """Places of a step, and who has them.

    With k adapters that always want to compute and a limit of l, each computes at least once in every
    ceil(k / l) · TURN_STEPS steps.
    """

    def __init__(self, limit: int) -> None:
        assert limit >= 1, limit
        self.limit = limit
        self._ran: dict[Adapter, int] = {}  # those who have a place → steps since they got it
        self._waited: dict[Adapter, int] = {}  # those who want one → steps since, longest first

    def choose(self, wanted: Iterable[Adapter]) -> frozenset[Adapter]:
        """Who computes now; at most `limit`.

        Args:
            wanted: the adapter of every text that could compute, in the order in which texts take turns; one that is
                named twice counts once.
        """
        distinct = dict.fromkeys(wanted)
        self._ran = {adapter: steps for adapter, steps in self._ran.items() if adapter in distinct}
        waiting = {adapter: self._waited.get(adapter, 0) for adapter in distinct if adapter not in self._ran}
        # Stable: of those who have waited as long, the first in `distinct` comes first.
        for adapter in sorted(waiting, key=lambda adapter: -waiting[adapter]):
            if len(self._ran) == self.limit:
                oldest = max(self._ran, key=lambda held: self._ran[held])
                if self._ran[oldest] < TURN_STEPS:
                    break
                del self._ran[oldest]
            self._ran[adapter] = 0
        self._waited = {adapter: steps + 1 for adapter, steps in waiting.items() if adapter not in self._ran}
        self._ran = {adapter: steps + 1 for adapter, steps in self._ran.items()}
        return frozenset(self._ran)


class ReadyAdapters:
    """Which adapters are ready to compute: at most `limit`, the base model counted as one, the least used go first.

    The base model goes after every adapter: it is what most texts use, and what makes a server useful without any.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: dict[Adapter, None] = {}  # least recently used first

    @property
    def held(self) -> Collection[Adapter]:
        """Those that are ready, the least recently used first."""
        return self._held.keys()

    def bring(self, wanted: Iterable[Adapter]) -> Sequence[Adapter]:
        """Make room for all of `wanted` at once; returns who has to leave, in order."""
        wanted = dict.fromkeys(wanted)
        assert len(wanted) <= self.limit, f"{len(wanted)} adapters in a step of at most {self.limit}"
        for adapter in wanted:
            self._held.pop(adapter, None)
        leaving = []
        while len(self._held) + len(wanted) > self.limit:
            adapter = next((held for held in self._held if held is not None), None)
            del self._held[adapter]
            leaving.append(adapter)
        self._held |= wanted
        return leaving

    def drop(self, adapter: Adapter) -> None:
        """It is not ready any more, if it was."""
        self._held.pop(adapter, None)
