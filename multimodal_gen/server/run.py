"""`mmgen serve`: socket, engine, HTTP front and signals of one server process."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from multimodal_gen.config import ServerConfig, check_bind
from multimodal_gen.errors import ConfigError, MmgenError, UserError
from multimodal_gen.observe.watchdog import stacks_after, watch_loop

if TYPE_CHECKING:
    import uvicorn

    from multimodal_gen.engine.cards import Cards
    from multimodal_gen.engine.client import EngineClient
    from multimodal_gen.engine.job_runner import JobRunner
    from multimodal_gen.llm.front import TextFront

log = logging.getLogger("multimodal_gen.server")

SEND_BUFFER_BYTES = 256 * 1024
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(config: ServerConfig) -> int:
    """Serve until a signal or a failure; returns the exit code.

    0: stopped by a signal, everything answered. 1: the engine failed. 2: the settings or the model are at fault.
    128 + signal: a second signal cut the first one's drain short. Reasons go to stderr.
    """
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        check_bind(config)
        listener = bind(config)
    except MmgenError as error:
        return _complain(error)
    with listener:
        return _run(_Server(config, listener).run())


def _run(main: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop  # type: ignore[import-not-found, unused-ignore]  # the extra fast-http
    except ImportError:
        return asyncio.run(main)
    return int(uvloop.run(main))


def bind(config: ServerConfig) -> socket.socket:
    """The listening socket; taking it first lets port 0 work and a taken port fail before a model is loaded.

    Raises: ConfigError.
    """
    host = config.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, config.port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {config.host} port {config.port}: {error.strerror or error}. Choose another --port, or "
            "0 for a free one.",
            param="port",
        ) from None
    # Connections inherit it. Left alone, the kernel would take 4 MB from us for each client that does not read.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    # asyncio sets this only on sockets of an explicit protocol; without it a body waits 40 ms behind its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server:
    """One run of the server."""

    def __init__(self, config: ServerConfig, listener: socket.socket) -> None:
        self.config = config
        self.listener = listener
        self.signals: asyncio.Queue[int] = asyncio.Queue()

    async def run(self) -> int:
        from multimodal_gen.engine.client import EngineClient

        # A start that hangs, or a long download, must end as any program does: the event loop would not see a signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            with stacks_after(self.config.load_timeout_s):
                engine = EngineClient(self.config)
                jobs = _jobs(self.config, engine)
                text = _text_front(self.config, engine)
                if jobs is not None:
                    await jobs.start()
        except MmgenError as error:
            return _complain(error)
        gc.freeze()  # modules and tables: not to be looked through while requests wait
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self.signals.put_nowait, int(number))
        url = url_of(self.listener)
        print(
            f"Listening at {url}, loading {engine.cards.name}; GET {url}/health/ready tells.",
            file=sys.stderr,
            flush=True,
        )
        watching = asyncio.create_task(watch_loop())
        code = 1
        await engine.start()  # first: workers import torch while this process imports its HTTP side
        try:
            make = await asyncio.to_thread(_http)
            front = make(self.config, engine, jobs, text)
            serving = asyncio.create_task(front.serve(sockets=[self.listener]))
            code = await self._watch(engine, jobs, serving)
            front.should_exit = True
            front.force_exit = code > 128
        finally:
            if text is not None:
                text.close()
            if jobs is not None:  # first, so that its jobs wait for the next start and do not fail with the engine
                await jobs.stop()
            await (engine.stop(patience_s=0.0) if code > 128 else engine.stop())
        if code <= 128:
            await serving
        else:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
        watching.cancel()
        return code

    async def _watch(self, engine: EngineClient, jobs: JobRunner | None, serving: asyncio.Task[None]) -> int:
        """Wait for the end, whatever brings it."""
        ready = asyncio.create_task(self._announce(engine))
        failed = asyncio.create_task(engine.failed.wait())
        asked = asyncio.create_task(self.signals.get())
        try:
            waiting: set[asyncio.Task[object]] = {ready, failed, asked, serving}
            while True:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if asked in done:
                    return await self._drain(engine, jobs)
                if ready in done:
                    ready.result()
                if failed in done:
                    return _complain(engine.failure or MmgenError("The engine stopped."))
                if serving in done:
                    serving.result()
                    return 1
        except MmgenError as error:  # the model did not load
            return _complain(error)
        finally:
            for task in (ready, failed, asked):
                task.cancel()

    async def _announce(self, engine: EngineClient) -> None:
        await engine.wait_ready()
        ready = engine.ready
        assert ready is not None, engine.state
        url = url_of(self.listener)
        key = "" if self.config.api_key is None else ' -H "Authorization: Bearer $MMGEN_API_KEY"'
        print(
            f"Ready at {url}: {_served(engine, self.config)} on {ready.device} in {ready.dtype}, "
            f"loaded in {ready.load_seconds:.1f} s. Try:\ncurl {url}{_example(engine.cards, key)}",
            flush=True,
        )

    async def _drain(self, engine: EngineClient, jobs: JobRunner | None) -> int:
        """Refuse new requests, finish running ones; a second signal ends the wait."""
        limit = self.config.drain_timeout_s
        log.info("draining: new requests are refused, running ones have %g s", limit)
        drains = [engine.drain(limit)] if jobs is None else [engine.drain(limit), jobs.drain(limit)]
        draining = asyncio.create_task(_all(drains))
        again = asyncio.create_task(self.signals.get())
        await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
        code = 0 if draining.done() else 128 + again.result()
        for task in (draining, again):
            task.cancel()
        await asyncio.gather(draining, again, return_exceptions=True)
        return code


def _http() -> Callable[[ServerConfig, EngineClient, JobRunner | None, TextFront | None], uvicorn.Server]:
    """What makes the HTTP side; importing it takes longest of all that the front does at its start."""
    from multimodal_gen.server.front import front

    return front


def _served(engine: EngineClient, config: ServerConfig) -> str:
    named, cards = config.served_model_name, engine.cards
    beside = named is not None and cards.pictures is not None and cards.text is not None
    return f"{named} and {cards.text.name}" if beside and cards.text is not None else named or cards.name


def _example(cards: Cards, key: str) -> str:
    """Path and arguments of a curl command that these models can answer."""
    card = cards.pictures
    if card is None:
        return (
            f"/v1/chat/completions{key} -H 'Content-Type: application/json' "
            '-d \'{"messages": [{"role": "user", "content": "Hello!"}]}\''
        )
    if card.video is not None and card.video.image == "required":
        return f"/v1/videos{key} -F prompt='it moves' -F input_reference=@first.png"
    path = "/v1/images/generations" if card.video is None else "/v1/videos"
    return f"{path}{key} -H 'Content-Type: application/json' -d '{{\"prompt\": \"a red apple\"}}'"


async def _all(waits: Sequence[Coroutine[Any, Any, None]]) -> None:
    await asyncio.gather(*waits)


def _text_front(config: ServerConfig, engine: EngineClient) -> TextFront | None:
    """What reads and writes for a language model. Raises: CorruptModel, ConfigError."""
    if engine.cards.text is None:
        return None
    from multimodal_gen.llm.front import TextFront
    from multimodal_gen.server.text_formats import Forms

    front = TextFront.open(engine.cards.text, config, config.grammar_timeout_s)
    try:
        Forms.of(config, front)  # a parser that there is not is told before the model is loaded
    except MmgenError:
        front.close()
        raise
    front.grammars.prepare()
    return front


def _jobs(config: ServerConfig, engine: EngineClient) -> JobRunner | None:
    """The jobs of a model that makes videos. Raises: ConfigError."""
    if engine.cards.pictures is None or engine.cards.pictures.media != "video":
        return None
    from multimodal_gen.engine.job_runner import JobRunner

    return JobRunner(config, engine)


def _complain(error: MmgenError) -> int:
    print(f"mmgen serve: {error.message}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, UserError) else 1
