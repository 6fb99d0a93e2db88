"""The files of one job, written while its frames come: an encoder works beside the decoder; no video is held whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from multimodal_gen.media.orders import WriteVideo
from multimodal_gen.media.process import VideoWriter
from multimodal_gen.messages import Frames

MakeOrder = Callable[[int, tuple[str, ...]], WriteVideo]


class JobWriter:
    """Takes `Frames`: those of one output after those of another, as the engine makes them."""

    def __init__(self, order: MakeOrder, encoders: asyncio.Semaphore) -> None:
        """
        Args:
            order: (index of an output, merged trees) → what is to be written.
            encoders: how many may work at once.
        """
        self.seconds = 0.0  # that encoders have made others wait for
        self._order = order
        self._encoders = encoders
        self._writer: VideoWriter | None = None
        self._next = (0, 0)  # output and frame that come next, while one is written

    async def take(self, frames: Frames) -> None:
        """Hand frames to the encoder; with the last ones, wait for the files. Raises: StorageFull, GenerationFailed."""
        if self._writer is None:
            order = self._order(frames.index, frames.merged)
            await self._encoders.acquire()
            self._writer, self._next = VideoWriter(order), (frames.index, 0)
            await self._writer.start()
        assert (frames.index, frames.begin) == self._next, (frames.index, frames.begin, self._next)
        count, *sides = frames.pixels.shape
        assert tuple(sides) == self._writer.order.shape[1:], (sides, self._writer.order.shape)
        self._next = (frames.index, frames.begin + count)
        await self._writer.write(frames.pixels.data)
        if self._next[1] == self._writer.order.shape[0]:
            await self._writer.finish()
            await self.close()

    async def close(self) -> None:
        """End the encoder, wherever it is."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self.seconds += writer.seconds
            self._encoders.release()
            await writer.close()
