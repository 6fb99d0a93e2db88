"""An `EngineClient` for callers without an event loop: in a thread, with the same workers that a server has."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from multimodal_gen.config import EngineConfig, ServerConfig
from multimodal_gen.engine.client import EngineClient

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

Result = TypeVar("Result")


class Background:
    """Started and ready once it is made; none of its workers is left when it is closed or forgotten."""

    def __init__(self, config: EngineConfig) -> None:
        """Starts the workers and waits for them. Raises: CorruptModel, ConfigError, WorkerCrashed."""
        level = logging.getLogger().getEffectiveLevel()
        named = next((name for name in ("debug", "info", "warning") if level <= LEVELS[name]), "error")
        settings = {**msgspec.structs.asdict(config), "log_level": named}
        self.client = EngineClient(msgspec.convert(settings, ServerConfig))
        self.loop = asyncio.new_event_loop()
        # The kernel ends workers when the thread that started them ends: it must live as long as they.
        thread = threading.Thread(target=self.loop.run_forever, name="engine", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, self.client, self.loop, thread)
        try:
            self.do(self.client.start())
            self.do(self.client.wait_ready())
        except BaseException:
            self.close()
            raise

    def do(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def begin(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """The same for what must be called in the thread, too."""

        async def awaited() -> Result:
            return await work()

        return self.do(awaited())

    def cancel(self, ids: list[str]) -> None:
        """Give requests up; unknown ids are ignored."""

        async def cancel() -> None:
            for request_id in ids:
                self.client.cancel(request_id)

        self.do(cancel())

    def close(self) -> None:
        """End the workers."""
        self._end()


def _end(client: EngineClient, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    asyncio.run_coroutine_threadsafe(client.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
