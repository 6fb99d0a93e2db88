"""The text side in the caller's own process, or in workers of its own: what `LLM` drives."""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from multimodal_gen.adapters import AdapterSource, LoraState, SwapLoras
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.background import Background
from multimodal_gen.engine.orders import rebuilt
from multimodal_gen.engine.text_loras import Loading, TextLoras
from multimodal_gen.errors import Asleep, MmgenError
from multimodal_gen.messages import Failed, LorasChanged, MemoryChanged, Sleep, TextDelta, TextFinished, TextStep, Wake
from multimodal_gen.text import TextCard, TextInfo, TextRequest

if TYPE_CHECKING:
    from multimodal_gen.engine.text import TextSide

log = logging.getLogger(__name__)

Result = TypeVar("Result")
OnText = Callable[[TextDelta | TextFinished], None]


class TextEngine(Protocol):
    """A loaded language model, asked synchronously and from one thread at a time."""

    @property
    def info(self) -> TextInfo:
        """What is loaded."""

    def run(self, requests: Sequence[TextRequest], on_text: OnText) -> None:
        """Run requests to their end. Whatever is raised, also by `on_text`, leaves nothing of them behind."""

    @property
    def adapters(self) -> TextLoras:
        """Those that requests may name."""

    def load_adapter(self, source: AdapterSource, *, pinned: bool) -> Loading:
        """Load one, whatever has to leave for it. Raises: the AdapterError family; all is as before then."""

    def unload_adapter(self, name: str) -> None:
        """Forget one. Raises: AdapterNotFound."""

    def sleep(self) -> MemoryChanged:
        """Give the memory of weights and caches back."""

    def wake(self) -> MemoryChanged:
        """Bring the weights back. Raises: WeightsUnavailable, OutOfMemory; it sleeps on then."""

    def close(self) -> None:
        """Free the model."""


class LocalTextEngine:
    """One rank, in this process."""

    def __init__(self, card: TextCard, config: EngineConfig) -> None:
        """Loads the model. Raises: CorruptModel, ConfigError, OutOfMemory."""
        self._card = card
        self._config = config
        self._loras: LoraState | None = None  # of a side that was let go
        self._names = TextLoras(config, self._change, users=lambda digest: 0)
        self._side: TextSide | None = self._load()
        self._names.begin(self._side.core.adapters.state)

    def _load(self) -> TextSide:
        from multimodal_gen.engine.computing import settle
        from multimodal_gen.engine.ranks import Ranks
        from multimodal_gen.engine.text import TextSide
        from multimodal_gen.parallel.mesh import Mesh

        settle(self._config)
        side = TextSide(self._card, self._config, Ranks(Mesh.solo()))
        side.bring_adapters(self._loras)
        # An injected fault belongs to the first engine only, as it does to the first worker of a server.
        self._config = msgspec.structs.replace(self._config, fault=None)
        return side

    @property
    def side(self) -> TextSide:
        """The engine proper; one that is not to be trusted any more is let go of first."""
        if self._side is not None and self._side.sick and not self._side.asleep:
            log.warning("%d failures in a row: loading %s anew", self._config.max_consecutive_errors, self._card.name)
            self._loras, self._side = self._side.changes.manager.state, None
        if self._side is None:
            self._side = self._load()
        return self._side

    @property
    def info(self) -> TextInfo:
        """What is loaded."""
        return self.side.info

    def run(self, requests: Sequence[TextRequest], on_text: OnText) -> None:
        """Run requests to their end."""
        side = self.side
        if side.asleep:
            raise Asleep("The model is asleep and its memory is given back; wake it first.")
        try:
            for request in requests:
                for event in side.add(request):
                    _hear(event, on_text)
            while not side.idle:
                for event in side.step():
                    _hear(event, on_text)
        finally:  # an error, an exception in on_text or Ctrl-C: nothing of this call may stay queued
            for request in requests:
                side.cancel(request.id)

    @property
    def adapters(self) -> TextLoras:
        """Those that requests may name."""
        return self._names

    def load_adapter(self, source: AdapterSource, *, pinned: bool) -> Loading:
        """Load one, whatever has to leave for it. Raises: the AdapterError family."""
        return _apart(self._names.load(source, pinned=pinned))

    def unload_adapter(self, name: str) -> None:
        """Forget one. Raises: AdapterNotFound."""
        _apart(self._names.unload(name))

    async def _change(self, change: SwapLoras) -> LorasChanged:
        return self.side.change_adapters(change)

    def sleep(self) -> MemoryChanged:
        """Give the memory of weights and caches back."""
        return _checked(self.side.rest(Sleep("")))

    def wake(self) -> MemoryChanged:
        """Bring the weights back. Raises: WeightsUnavailable, OutOfMemory."""
        return _checked(self.side.rest(Wake("")))

    def close(self) -> None:
        """Free the model."""
        self._side = None


class RemoteTextEngine:
    """Several ranks or replicas, in processes of their own."""

    def __init__(self, config: EngineConfig) -> None:
        """Starts the workers and waits for them. Raises: CorruptModel, ConfigError, WorkerCrashed."""
        self._background = Background(config)
        self._client = self._background.client

    @property
    def info(self) -> TextInfo:
        """What is loaded, of rank 0."""
        ready = self._client.ready
        assert ready is not None, "the workers were ready once"
        assert ready.text is not None, "they host a language model"
        return ready.text

    def run(self, requests: Sequence[TextRequest], on_text: OnText) -> None:
        """Run requests to their end."""
        if self._client.failure is not None:
            raise self._client.failure
        heard: queue.SimpleQueue[TextDelta | TextFinished | MmgenError | None] = queue.SimpleQueue()
        listening = asyncio.run_coroutine_threadsafe(self._listen(requests, heard), self._background.loop)
        try:
            while (event := heard.get()) is not None:
                if isinstance(event, MmgenError):
                    raise event
                on_text(event)
            listening.result()
        finally:  # an error, an exception in on_text or Ctrl-C: nothing of this call may stay queued
            listening.cancel()
            self._background.cancel([request.id for request in requests])

    async def _listen(
        self,
        requests: Sequence[TextRequest],
        heard: queue.SimpleQueue[TextDelta | TextFinished | MmgenError | None],
    ) -> None:
        room = asyncio.Semaphore(self._client.config.max_queued_requests)

        async def listen(request: TextRequest) -> None:
            async with room:
                async for event in self._client.submit_text(request):
                    if isinstance(event, (TextDelta, TextFinished)):
                        heard.put(event)

        listening = [asyncio.create_task(listen(request)) for request in requests]
        try:
            await asyncio.gather(*listening)
        except MmgenError as error:
            heard.put(error)
        finally:
            for task in listening:  # those that wait for room must not ask any more
                task.cancel()
            heard.put(None)

    @property
    def adapters(self) -> TextLoras:
        """Those that requests may name."""
        return self._client.text_loras

    def load_adapter(self, source: AdapterSource, *, pinned: bool) -> Loading:
        """Load one in all workers, whatever has to leave for it. Raises: the AdapterError family, WorkerCrashed."""
        return self._background.do(self._client.text_loras.load(source, pinned=pinned))

    def unload_adapter(self, name: str) -> None:
        """Forget one. Raises: AdapterNotFound, WorkerCrashed."""
        self._background.do(self._client.text_loras.unload(name))

    def sleep(self) -> MemoryChanged:
        """Give the memory of weights and caches back, in all workers."""
        return self._background.begin(self._client.sleep)

    def wake(self) -> MemoryChanged:
        """Bring the weights back. Raises: WeightsUnavailable, OutOfMemory, WorkerCrashed."""
        return self._background.begin(self._client.wake)

    def close(self) -> None:
        """End the workers."""
        self._background.close()


def _apart(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end; the caller's thread may have an event loop that runs."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _hear(event: object, on_text: OnText) -> None:
    """Raises: the error of a request that failed."""
    if isinstance(event, Failed):
        raise rebuilt(event.error)
    if isinstance(event, TextStep):
        for delta in event.deltas:
            on_text(delta)
    elif isinstance(event, TextFinished):
        on_text(event)


def _checked(done: MemoryChanged) -> MemoryChanged:
    if done.error is not None:
        raise rebuilt(done.error)
    return done
