"""What streaming asks of a device with memory of its own: a stream of copies beside the stream of computing."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from torch import Tensor

Event: TypeAlias = Any  # a point in a stream; opaque outside of the `Streams` that recorded it


class Streams(Protocol):
    """Work is handed over and done later, in order within a stream; only events order the streams to each other.

    The stream of computing is the one that is current in the calling thread; the mover asks for it in the engine's
    thread only. The stream of copies is its own.
    """

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Hand over a copy from the host into the device's memory."""

    def copied(self) -> Event:
        """The end of the copies handed over so far."""

    def computed(self) -> Event:
        """The end of the computing handed over so far."""

    def copy_after(self, event: Event) -> None:
        """Copies handed over from now on begin after an event."""

    def compute_after(self, event: Event) -> None:
        """Computing handed over from now on begins after an event."""

    def host_after(self, event: Event) -> None:
        """Return after an event."""

    def seconds(self, first: Event, last: Event) -> float | None:
        """Between two events of the stream of computing; None while the last is still to come."""

    def pin(self, memory: Tensor) -> bool:
        """Page-lock host memory (whole pages), so that copies run beside the processor; False: the system refuses.

        Called in a thread that never computes on the device.
        """

    def unpin(self, memory: Tensor) -> None:
        """Before pinned memory is freed; no copy from it may be left."""
