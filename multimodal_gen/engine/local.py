"""The engine in the caller's own process, or in workers of its own: what `DiffGenerator` drives.

`LocalEngine` runs `EngineCore` here. `RemoteEngine` starts the same group of workers that a server has, with the same
supervision, and talks to it from a thread: several ranks or replicas, none of which is left behind when the caller
stops half-way.
"""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from multimodal_gen.adapters import Change, LoraState
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.background import Background
from multimodal_gen.engine.orders import rebuilt
from multimodal_gen.errors import Asleep, MmgenError
from multimodal_gen.memory.host import release_freed_memory
from multimodal_gen.messages import Event, LorasChanged, MemoryChanged, Sleep, Wake
from multimodal_gen.request import AnyRequest, ModelCard

if TYPE_CHECKING:
    from multimodal_gen.engine.core import EngineCore
    from multimodal_gen.engine.ticket import Ticket, TicketEvent
    from multimodal_gen.pipelines.contract import PipelineInfo

RESTART_SECONDS = 0.05  # between looks at a worker that is being restarted

log = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]


class Engine(Protocol):
    """A loaded model, asked synchronously and from one thread at a time."""

    @property
    def info(self) -> PipelineInfo:
        """Device, dtype and attention backend in use."""

    @property
    def threads(self) -> int:
        """CPU threads of a forward."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Module trees that adapters can change."""

    @property
    def loras(self) -> LoraState:
        """What is loaded and what is active."""

    def refresh(self) -> None:
        """Load the model anew where the engine is not to be trusted any more."""

    def change(self, change: Change) -> LoraState:
        """A transaction on the adapters. Raises: the AdapterError family."""

    def sleep(self) -> MemoryChanged:
        """Give the memory of weights and caches back."""

    def wake(self) -> MemoryChanged:
        """Bring the weights back. Raises: WeightsUnavailable, OutOfMemory; it sleeps on then."""

    def run(self, requests: Sequence[AnyRequest], on_event: OnEvent) -> None:
        """Run requests to their end. Whatever is raised, also by `on_event`, leaves nothing of them behind."""

    def close(self) -> None:
        """Free the model."""


class LocalEngine:
    """One rank, in this process."""

    def __init__(self, card: ModelCard, config: EngineConfig) -> None:
        """Loads the model. Raises: CorruptModel, ConfigError."""
        self._card = card
        self._config = config
        self._loras: LoraState | None = None  # of a core that was let go
        self._core: EngineCore | None = None
        self._ended = False  # asleep without a core
        self._core = self.core

    @property
    def core(self) -> EngineCore:
        """The engine proper, loaded where there is none. Raises: Asleep."""
        if self._ended:
            raise Asleep("The model is asleep and its memory is given back; wake it first.")
        if self._core is None:
            from multimodal_gen.engine.core import EngineCore

            core = EngineCore(self._card, self._config)
            core.bring_adapters(self._loras)
            # An injected fault belongs to the first engine only, as it does to the first worker of a server.
            self._core, self._config = core, msgspec.structs.replace(self._config, fault=None)
        return self._core

    @property
    def info(self) -> PipelineInfo:
        """Device, dtype and attention backend in use."""
        return self.core.pipeline.info

    @property
    def threads(self) -> int:
        """CPU threads of a forward."""
        return self.core.threads

    @property
    def targets(self) -> tuple[str, ...]:
        """Module trees that adapters can change."""
        return tuple(self.core.pipeline.trees)

    @property
    def loras(self) -> LoraState:
        """What is loaded and what is active."""
        return self._loras if self._ended and self._loras is not None else self.core.loras.state

    def refresh(self) -> None:
        """Let go of a sick engine; the memory must be free before the next one is loaded."""
        if self._core is not None and self._core.sick and not self._core.sleeper.asleep:
            log.warning("%d failures in a row: loading %s anew", self._config.max_consecutive_errors, self._card.name)
            self._loras = self._core.loras.state
            self._core = None

    def change(self, change: Change) -> LoraState:
        """A transaction on the adapters. Raises: the AdapterError family."""
        return self.core.change_adapters(change).state

    def sleep(self) -> MemoryChanged:
        """Give the memory of weights and caches back; where nobody but diffusers knows of them, with the whole core."""
        if self._ended:
            return MemoryChanged("", 0.0)
        if self.core.sleeper.plan is not None:
            return self._rest(Sleep(""))
        self._loras, self._core, self._ended = self.core.loras.state, None, True
        release_freed_memory()
        return MemoryChanged("", 0.0)

    def wake(self) -> MemoryChanged:
        """Bring the weights back. Raises: WeightsUnavailable, OutOfMemory."""
        if not self._ended:
            return self._rest(Wake(""))
        self._ended = False
        try:
            return MemoryChanged("", 0.0, weights=self.core.sleeper.weights)
        except BaseException:
            self._ended = True
            raise

    def _rest(self, order: Sleep | Wake) -> MemoryChanged:
        done = self.core.rest(order)
        if done.error is not None:
            raise rebuilt(done.error)
        return done

    def run(self, requests: Sequence[AnyRequest], on_event: OnEvent) -> None:
        """Run requests to their end."""
        core = self.core
        try:
            for request in requests:
                for event in core.add(request):
                    on_event(event)
            while not core.idle:
                for event in core.step():
                    on_event(event)
        finally:  # an error, an exception in on_event or Ctrl-C: nothing of this call may stay queued
            for request in requests:
                core.cancel(request.id)

    def close(self) -> None:
        """Free the model."""
        self._core = None


class RemoteEngine:
    """Several ranks or replicas, in processes of their own."""

    def __init__(self, config: EngineConfig) -> None:
        """Starts the workers and waits for them. Raises: CorruptModel, ConfigError, WorkerCrashed."""
        self._background = Background(config)
        self._client = self._background.client

    @property
    def info(self) -> PipelineInfo:
        """Device, dtype and attention backend of rank 0; parameters of the whole model."""
        from multimodal_gen.pipelines.contract import PipelineInfo

        ready = self._client.ready
        assert ready is not None, "the workers were ready once"
        return PipelineInfo(ready.device, ready.dtype, ready.attention_backend, ready.parameters)

    @property
    def threads(self) -> int:
        """CPU threads of each rank."""
        assert self._client.ready is not None, "the workers were ready once"
        return self._client.ready.threads

    @property
    def targets(self) -> tuple[str, ...]:
        """Module trees that adapters can change."""
        assert self._client.ready is not None, "the workers were ready once"
        return self._client.ready.targets

    @property
    def loras(self) -> LoraState:
        """What is loaded and what is active."""
        return self._client.loras

    def refresh(self) -> None:
        """Workers that are sick end and are started again by themselves. Raises: the error that ended that."""
        if self._client.failure is not None:
            raise self._client.failure

    def change(self, change: Change) -> LoraState:
        """A transaction on the adapters of all replicas. Raises: the AdapterError family, WorkerCrashed."""
        return self._background.do(self._change(change)).state

    async def _change(self, change: Change) -> LorasChanged:
        client = self._client
        while client.failure is None and any(replica.state == "restarting" for replica in client.replicas):
            await asyncio.sleep(RESTART_SECONDS)
        return await client.change_loras(change)

    def sleep(self) -> MemoryChanged:
        """Give the memory of weights and caches back, in all workers."""
        return self._background.begin(self._client.sleep)

    def wake(self) -> MemoryChanged:
        """Bring the weights back. Raises: WeightsUnavailable, OutOfMemory, WorkerCrashed."""
        return self._background.begin(self._client.wake)

    def run(self, requests: Sequence[AnyRequest], on_event: OnEvent) -> None:
        """Run requests to their end."""
        heard: queue.SimpleQueue[TicketEvent | MmgenError | None] = queue.SimpleQueue()
        listening = asyncio.run_coroutine_threadsafe(self._listen(requests, heard), self._background.loop)
        try:
            while (event := heard.get()) is not None:
                if isinstance(event, MmgenError):
                    raise event
                on_event(event)
            listening.result()
        finally:  # an error, an exception in on_event or Ctrl-C: nothing of this call may stay queued
            self._background.cancel([request.id for request in requests])

    async def _listen(
        self, requests: Sequence[AnyRequest], heard: queue.SimpleQueue[TicketEvent | MmgenError | None]
    ) -> None:
        async def listen(ticket: Ticket) -> None:
            try:
                async for event in ticket:
                    heard.put(event)
            except MmgenError as error:
                heard.put(error)

        try:
            tickets = [self._client.submit(request) for request in requests]
            await asyncio.gather(*(listen(ticket) for ticket in tickets))
        except MmgenError as error:  # not admitted
            heard.put(error)
        finally:
            heard.put(None)

    def close(self) -> None:
        """End the workers."""
        self._background.close()
