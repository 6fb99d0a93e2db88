"""A set of ranks that compute together, over process groups of its own.

torch.distributed's global default group is never made: several groups live beside one another in a process, and a
user's own use of torch.distributed is left alone. Every rank of a group calls the same operations in the same order.

Each operation counts the bytes that this rank has to put on the wire, by the formula of the algorithm that moves the
least (P ranks, n bytes of this rank's tensor, e elements of i bytes):

    all_reduce_   2 · (P - 1) · ⌈e / P⌉ · i     ring: reduce-scatter, then all-gather
    all_gather    (P - 1) · n
    all_to_all    (P - 1) · n / P
    broadcast_    (P - 1) · n on the source, nothing elsewhere
    shift         n
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch._C._distributed_c10d as c10d
from torch import Tensor

from multimodal_gen.errors import PeerLost
from multimodal_gen.kernels.eager import eager_break

if TYPE_CHECKING:
    from torch._C._distributed_c10d import AllgatherOptions, BroadcastOptions, Store, Work


class Collectives(Protocol):
    """What is used of torch's process groups; its stubs name these methods on another class."""

    def allreduce(self, tensors: list[Tensor]) -> Work: ...
    def broadcast(self, tensors: list[Tensor], opts: BroadcastOptions) -> Work: ...
    def _allgather_base(self, output: Tensor, input: Tensor, opts: AllgatherOptions) -> Work: ...  # noqa: A002
    def alltoall_base(
        self,
        output: Tensor,
        input: Tensor,  # noqa: A002
        output_split_sizes: list[int],
        input_split_sizes: list[int],
    ) -> Work: ...


LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Meeting:
    """How ranks find one another."""

    store: Store  # one for all ranks of all groups, fresh for every start: a FileStore on one host, else a TCPStore
    timeout_s: float  # how long any operation waits for a rank that does not answer
    address: str = LOOPBACK  # where this rank listens (gloo): other hosts reach only an address of this one's network


@dataclass
class Arriving:
    """A tensor that is on its way."""

    tensor: Tensor  # complete after `wait`
    kept: Tensor  # what is being sent: it must not be freed before
    work: Work | None
    what: str

    def wait(self) -> Tensor:
        """The received tensor. Raises: PeerLost."""
        if self.work is not None:
            with _lost(self.what):
                self.work.wait()
            self.work = None
        return self.tensor


class Group:
    """Ranks that compute together. A group of one does nothing and sends nothing."""

    def __init__(self, rank: int, size: int, backend: Collectives | None, device: torch.device) -> None:
        """`backend` is None for a group of one; tensors given to the operations live on `device`."""
        assert (backend is None) == (size == 1), "a group of one has no backend, any other has one"
        self.rank, self.size, self.device = rank, size, device
        self.sent: Counter[str] = Counter()  # operation → bytes that this rank sent
        self._backend = backend

    @classmethod
    def connect(cls, rank: int, size: int, meeting: Meeting, device: torch.device, name: str) -> Group:
        """Meet the other ranks: gloo for the CPU, NCCL for CUDA.

        Args:
            name: keeps this group's keys in the store apart.

        Raises: PeerLost when some rank does not come in time.
        """
        if size == 1:
            return cls(rank, size, None, device)
        with _lost(f"meeting the ranks of group {name}"):
            backend = _backend(rank, size, meeting, device, name)
        return cls(rank, size, backend, device)

    @property
    def next(self) -> int:
        """The rank after this one on the ring."""
        return (self.rank + 1) % self.size

    @property
    def previous(self) -> int:
        """The rank before this one on the ring."""
        return (self.rank - 1) % self.size

    @eager_break
    def all_reduce_(self, x: Tensor) -> Tensor:
        """x becomes the sum of every rank's x, bit-equal on all ranks; returns x. Raises: PeerLost."""
        if self._backend is None:
            return x
        whole = x if x.is_contiguous() else x.contiguous()
        self.sent["all_reduce"] += 2 * (self.size - 1) * -(-x.numel() // self.size) * x.itemsize
        self._run("all_reduce", self._backend.allreduce([whole]))
        return x if whole is x else x.copy_(whole)

    def all_gather(self, x: Tensor) -> Tensor:
        """x [n, ...] of equal shapes → [size · n, ...], in rank order. Raises: PeerLost."""
        return self._all_gather(x, None)

    def _all_gather(self, x: Tensor, timeout_s: float | None) -> Tensor:
        if self._backend is None:
            return x
        x = x.contiguous()
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        options = c10d.AllgatherOptions()
        if timeout_s is not None:
            options.timeout = timedelta(seconds=timeout_s)
        self.sent["all_gather"] += (self.size - 1) * x.nbytes
        self._run("all_gather", self._backend._allgather_base(out, x, options))
        return out

    def all_to_all(self, x: Tensor) -> Tensor:
        """x [size · n, ...] → [size · n, ...]: block i goes to rank i, block j comes from rank j. Raises: PeerLost."""
        if self._backend is None:
            return x
        assert x.shape[0] % self.size == 0, f"{x.shape[0]} rows cannot be split over {self.size} ranks"
        x = x.contiguous()
        out = torch.empty_like(x)
        self.sent["all_to_all"] += (self.size - 1) * (x.nbytes // self.size)
        self._run("all_to_all", self._backend.alltoall_base(out, x, [], []))
        return out

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        """x becomes the source's x; returns x. Raises: PeerLost."""
        self._broadcast(x, source, None)
        return x

    def start_shift(self, x: Tensor) -> Arriving:
        """Begin to send x to the next rank and to receive the previous rank's, of the same shape."""
        if self._backend is None:
            return Arriving(x, x, None, "shift")
        x = x.contiguous()
        out, rows = torch.empty_like(x), x.shape[0]
        self.sent["shift"] += x.nbytes
        sizes_out = [rows if rank == self.previous else 0 for rank in range(self.size)]
        sizes_in = [rows if rank == self.next else 0 for rank in range(self.size)]
        with _lost("shift"):
            return Arriving(out, x, self._backend.alltoall_base(out, x, sizes_out, sizes_in), "shift")

    def shift(self, x: Tensor) -> Tensor:
        """x goes to the next rank; returns the previous rank's. Raises: PeerLost."""
        return self.start_shift(x).wait()

    def barrier(self) -> None:
        """Wait until every rank is here. Raises: PeerLost."""
        if self._backend is not None:
            token = torch.zeros(1, device=self.device)
            self._run("barrier", self._backend.allreduce([token]))
            token.item()  # on CUDA, waiting for an operation only orders the stream

    # --- small control messages -------------------------------------------------------------------------------------

    def broadcast_bytes(self, data: bytes | None, source: int, timeout_s: float | None = None) -> bytes:
        """The source's `data`, which is None elsewhere; `timeout_s` where the wait may be longer or shorter than the
        group's own. Raises: PeerLost."""
        if self._backend is None:
            assert data is not None, "a group of one is its own source"
            return data
        assert (data is None) == (self.rank != source), "the source has the data, nobody else"
        length = torch.tensor([len(data or b"")], dtype=torch.int64, device=self.device)
        self._broadcast(length, source, timeout_s)
        body = self._tensor(data) if data is not None else length.new_empty(int(length), dtype=torch.uint8)
        if len(body):
            self._broadcast(body, source, timeout_s)
        return data if data is not None else bytes(body.cpu().numpy())

    def all_gather_bytes(self, data: bytes, timeout_s: float | None = None) -> list[bytes]:
        """Every rank's data, in rank order; `timeout_s` where the wait may be longer or shorter than the group's own.
        Raises: PeerLost."""
        if self._backend is None:
            return [data]
        own = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        lengths = self._all_gather(own, timeout_s).tolist()
        padded = torch.zeros(1, max(1, *lengths), dtype=torch.uint8, device=self.device)
        padded[0, : len(data)] = self._tensor(data)
        found = self.all_gather(padded).cpu().numpy()
        return [bytes(row[:length]) for row, length in zip(found, lengths, strict=True)]

    def _tensor(self, data: bytes) -> Tensor:
        if not data:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)

    def _broadcast(self, x: Tensor, source: int, timeout_s: float | None) -> None:
        if self._backend is None:
            return
        assert x.is_contiguous(), "a broadcast fills memory in order"
        options = c10d.BroadcastOptions()
        options.rootRank = source
        if timeout_s is not None:
            options.timeout = timedelta(seconds=timeout_s)
        if self.rank == source:
            self.sent["broadcast"] += (self.size - 1) * x.nbytes
        self._run("broadcast", self._backend.broadcast([x], options))

    def _run(self, what: str, work: Work) -> None:
        with _lost(what):
            work.wait()


def _backend(rank: int, size: int, meeting: Meeting, device: torch.device, name: str) -> Collectives:
    store, timeout = c10d.PrefixStore(name, meeting.store), timedelta(seconds=meeting.timeout_s)
    made: object
    if device.type == "cuda":
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timeout
        made = c10d.ProcessGroupNCCL(store, rank, size, options)
    else:
        own: Any = vars(c10d.ProcessGroupGloo)["_Options"]()  # torch's stubs do not know it
        own._timeout, own._devices = timeout, [c10d.ProcessGroupGloo.create_device(hostname=meeting.address)]
        made = c10d.ProcessGroupGloo(store, rank, size, own)
    return cast("Collectives", made)


@contextmanager
def _lost(what: str) -> Iterator[None]:
    """torch tells of a peer that died or is silent with a RuntimeError, whose text holds addresses."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLost(
            f"Another rank of this group of workers ended or stopped answering ({what}). The whole group has to be "
            "started again."
        ) from error


SOLO = Group(0, 1, None, torch.device("cpu"))
