"""How the ranks of a replica stay of one mind: they start each turn with the same facts, and agree on every failure.

Each rank runs the same `EngineCore` on the same messages, so all plan the same steps without talking about them. What
may differ between them is what fails: one runs out of memory, one finds a file gone. Every piece of work that may fail
therefore ends with a vote, and all ranks go on as if the worst outcome had been everybody's.

A rank that is alone votes with itself.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from multimodal_gen.engine.failures import as_ours, info_of
from multimodal_gen.errors import MmgenError, OutOfMemory, PeerLost, from_code
from multimodal_gen.messages import ErrorInfo, Outcome, Seat, Turn, decode_outcome, decode_turn, encode
from multimodal_gen.parallel.mesh import Mesh

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

    from multimodal_gen.parallel.degrees import Degrees

IDLE_SECONDS = 365 * 86_400.0  # a quiet year is no failure; a rank that died closes its connections

LOCKSTEP_SECONDS = 20.0

log = logging.getLogger(__name__)


class Ranks:
    """One rank's tie to the others."""

    def __init__(self, mesh: Mesh, step_timeout_s: float = LOCKSTEP_SECONDS) -> None:
        self.mesh = mesh
        self._lockstep_s = min(step_timeout_s, LOCKSTEP_SECONDS)

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.mesh.control.size == 1

    @property
    def leads(self) -> bool:
        """Whether this rank talks to the front."""
        return self.mesh.rank == 0

    def share(self, turn: Turn | None) -> Turn:
        """Rank 0's turn, on all ranks; the others wait here while there is nothing to do. Raises: PeerLost."""
        if self.alone:
            assert turn is not None, "rank 0 makes the turn"
            return turn
        frame = self.mesh.control.broadcast_bytes(None if turn is None else encode(turn), 0, IDLE_SECONDS)
        return turn or decode_turn(frame)

    def agree(
        self, work: str, error: Exception | None, *, in_lockstep: bool = False, patience_s: float | None = None
    ) -> MmgenError | None:
        """What a piece of work has come to for all ranks together, given what it came to here; a short memory wins.

        Args:
            in_lockstep: ranks wait for one another inside the work. Those that fail together do so at the same point,
                so a rank that failed need not wait long for the votes: the others may be waiting for it.
            patience_s: how long to wait for the votes otherwise; None: as long as a step may take.

        Raises: PeerLost where a rank does not vote in time, or voted on something else. The group must be started
            again then.
        """
        own = None if error is None else as_ours(error)
        if self.alone:
            return own
        outcome = Outcome(work, None if own is None else info_of(own))
        limit = self._lockstep_s if in_lockstep and own is not None else patience_s
        try:
            outcomes = [decode_outcome(frame) for frame in self.mesh.control.all_gather_bytes(encode(outcome), limit)]
        except msgspec.DecodeError as wrong:
            raise PeerLost(f"Another rank is not at {work!r}, where this one is: they have come apart.") from wrong
        for rank, other in enumerate(outcomes):
            if other.work != work:
                raise PeerLost(f"Rank {rank} is at {other.work!r} and this one at {work!r}: they have come apart.")
        return _worst([other.error for other in outcomes if other.error is not None])

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's data, in their order. Raises: PeerLost."""
        return self.mesh.control.all_gather_bytes(data)

    def all_here(self, timeout_s: float) -> None:
        """Wait until all ranks are. Raises: PeerLost."""
        for rank in range(self.mesh.control.size):
            self.mesh.control.broadcast_bytes(b"" if rank == self.mesh.rank else None, rank, timeout_s)


def _worst(errors: Sequence[ErrorInfo]) -> MmgenError | None:
    short = next((error for error in errors if error.code == OutOfMemory.code), None)
    worst = short or next(iter(errors), None)
    return None if worst is None else from_code(worst.code, worst.message, worst.param)


def meet(seat: Seat, degrees: Degrees, device: torch.device, load_timeout_s: float, step_timeout_s: float) -> Ranks:
    """Find the other ranks of the replica; they may still be starting. Raises: PeerLost."""
    assert degrees.world == seat.ranks, f"{degrees} on {seat.ranks} ranks"
    if seat.ranks == 1:
        return Ranks(Mesh.solo())
    store = open_store(seat.store)
    # Groups wait no longer for a rank than a step may take; starting a process takes its own time.
    store.set(f"here/{seat.rank}", "")
    names = [f"here/{rank}" for rank in range(seat.ranks)]
    try:
        store.wait(names, datetime.timedelta(seconds=load_timeout_s))
    except RuntimeError as error:
        raise PeerLost(f"Not all of the {seat.ranks} ranks have started within {load_timeout_s:g} s.") from error
    mesh = Mesh.connect(degrees, seat.rank, store, device, step_timeout_s, seat.address)
    return Ranks(mesh, step_timeout_s)


def open_store(address: str) -> Store:
    """The place where ranks meet, from the address in their seats."""
    from torch._C._distributed_c10d import FileStore, TCPStore

    parts = urlsplit(address)
    if parts.scheme == "file":
        return FileStore(str(Path(parts.path)), -1)
    assert parts.scheme == "tcp", address
    assert parts.hostname is not None, address
    assert parts.port is not None, address
    return TCPStore(parts.hostname, parts.port, is_master=False, wait_for_workers=False)
