"""Work that may fail, with one outcome on all ranks, and its memory free again by then."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence

import torch

from multimodal_gen.engine.active import way_back
from multimodal_gen.engine.ranks import Ranks
from multimodal_gen.errors import MmgenError, PeerLost
from multimodal_gen.pipelines.contract import Row

log = logging.getLogger(__name__)


class Attempts:
    """How one engine tries things."""

    def __init__(self, ranks: Ranks, reset: Callable[[], None]) -> None:
        """`reset` lets go of what may differ between ranks after a failure that some of them did not see."""
        self._ranks = ranks
        self._reset = reset

    def __call__(
        self, what: str, work: Callable[[], None], rows: Sequence[Row] = (), patience_s: float | None = None
    ) -> MmgenError | None:
        """Run work; returns the error that it came to on all ranks together, or None.

        By then the memory that a traceback held is free again, and `rows`, which a step may have moved on some ranks
        only, are where they were.

        Args:
            patience_s: by how much the ranks may differ in the time it takes; None: as long as a step may take.

        Raises: PeerLost.
        """
        before = [] if self._ranks.alone else [way_back(row) for row in rows]
        verdict = agreed(self._ranks, what, work, lockstep=bool(rows), patience_s=patience_s)
        if verdict is not None and not self._ranks.alone:
            for go_back in before:
                go_back()
            self._reset()
        return verdict


def agreed(
    ranks: Ranks, what: str, work: Callable[[], None], *, lockstep: bool = False, patience_s: float | None = None
) -> MmgenError | None:
    """Run work; returns the error that it came to on all ranks together, or None. The memory is free again by then.

    Args:
        lockstep: ranks wait for one another inside the work.
        patience_s: by how much they may differ in the time it takes; None: as long as a step may take.

    Raises: PeerLost.
    """
    failure: Exception | None = None
    try:
        work()
    except PeerLost:
        raise
    except Exception as error:  # noqa: BLE001 - every kind of failure has the same answer: an end that is told
        failure = error
    if failure is not None:
        log.error("%s failed", what, exc_info=failure)
        traceback.clear_frames(failure.__traceback__)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    verdict = ranks.agree(what, failure, in_lockstep=lockstep, patience_s=patience_s)
    if verdict is not None and failure is None:
        log.error("%s failed on another rank: %s", what, verdict.message)
    return verdict
