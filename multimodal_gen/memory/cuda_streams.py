"""Streams of a CUDA device; nothing else in the package handles streams and events of torch.cuda."""

from __future__ import annotations

import torch
from torch import Tensor

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process


class CudaStreams:
    """See `Streams`."""

    def __init__(self, device: torch.device) -> None:
        self._copies = torch.cuda.Stream(device)
        self._device = self._copies.device  # with its index: what is current differs from thread to thread

    def copy(self, target: Tensor, source: Tensor) -> None:
        """From pageable memory the driver copies in pieces through its own buffer, and the caller waits for it."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def copied(self) -> torch.cuda.Event:
        """Whoever waits for it on the host sleeps instead of spinning."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._copies)
        return event

    def computed(self) -> torch.cuda.Event:
        """Knows its time."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy_after(self, event: torch.cuda.Event) -> None:
        """See `Streams`."""
        self._copies.wait_event(event)

    def compute_after(self, event: torch.cuda.Event) -> None:
        """See `Streams`."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def host_after(self, event: torch.cuda.Event) -> None:
        """See `Streams`."""
        event.synchronize()

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float | None:
        """See `Streams`."""
        return first.elapsed_time(last) / 1000 if last.query() else None

    def pin(self, memory: Tensor) -> bool:
        """A refusal stays behind as this thread's last CUDA error, for the next kernel to stumble over."""
        with torch.cuda.device(self._device):  # other threads begin on device 0, and would make a context there
            return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE)) == 0

    def unpin(self, memory: Tensor) -> None:
        """See `Streams`."""
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
