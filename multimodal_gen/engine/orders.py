"""What a group of workers is told to do beside requests: change its adapters, sleep, wake. One thing at a time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from multimodal_gen.engine.group import WorkerGroup
from multimodal_gen.errors import MmgenError, from_code
from multimodal_gen.messages import (
    ChangeLoras,
    ErrorInfo,
    LorasChanged,
    LorasRefused,
    MemoryChanged,
    Ready,
    Sleep,
    Wake,
)


@dataclass
class Order:
    """One that is not answered yet."""

    message: ChangeLoras | Sleep | Wake
    answer: asyncio.Future[LorasChanged | MemoryChanged]
    began: float = field(default_factory=time.monotonic)


class Orders:
    """The orders of one replica; all methods belong to its event loop."""

    def __init__(self) -> None:
        self._order: Order | None = None

    @property
    def pending(self) -> bool:
        """Whether an answer is due."""
        return self._order is not None

    @property
    def waking(self) -> bool:
        """Whether the model is to be brought back."""
        return self._order is not None and isinstance(self._order.message, Wake)

    async def change(self, message: ChangeLoras, group: WorkerGroup) -> LorasChanged:
        """Raises: the change's own error; what `fail` was called with."""
        done = await self._obeyed(message, group)
        assert isinstance(done, LorasChanged), done
        return done

    async def rest(self, message: Sleep | Wake, group: WorkerGroup | None) -> MemoryChanged:
        """The group's answer, which may be an error. One that is to be started anew is awake when it is ready.

        Raises: what `fail` was called with: the group is gone, or going.
        """
        done = await self._obeyed(message, group)
        assert isinstance(done, MemoryChanged), done
        return done

    async def _obeyed(
        self, message: ChangeLoras | Sleep | Wake, group: WorkerGroup | None
    ) -> LorasChanged | MemoryChanged:
        assert self._order is None, "the owner gives one order at a time"
        order = self._order = Order(message, asyncio.get_running_loop().create_future())
        try:
            if group is not None:
                group.send(message)
            return await order.answer
        finally:
            self._order = None

    def answered(self, message: LorasChanged | LorasRefused | MemoryChanged) -> None:
        """The group has answered; a change of adapters without an order is one of policy by itself."""
        order = self._order
        if order is None or order.message.id != message.id or order.answer.done():
            return
        if isinstance(message, LorasRefused):
            self.fail(rebuilt(message.error))
        else:
            order.answer.set_result(message)

    def ready(self, message: Ready) -> None:
        """A new group is ready, which answers the order to wake."""
        order = self._order
        if order is not None and self.waking:
            seconds = time.monotonic() - order.began
            self.answered(MemoryChanged(order.message.id, seconds, weights=message.weights))

    def fail(self, error: MmgenError) -> None:
        """End what is under way."""
        if self._order is not None and not self._order.answer.done():
            self._order.answer.set_exception(error)


def rebuilt(error: ErrorInfo) -> MmgenError:
    """The error that a worker told."""
    return from_code(error.code, error.message, error.param)
