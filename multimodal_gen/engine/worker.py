"""The worker process, started by `engine.process` with an inherited socket.

It reads `Load` first, then alternates between looking for messages and running one step. It sleeps in `poll` when
there is nothing to do, and exits when its front is gone.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from multimodal_gen.engine.channel import ChannelClosed, WorkerChannel
from multimodal_gen.errors import GenerationFailed, MmgenError
from multimodal_gen.messages import (
    Cancel,
    ChangeLoras,
    ErrorInfo,
    Event,
    Generate,
    Load,
    LoadFailed,
    Ready,
    Shutdown,
    ToWorker,
)

if TYPE_CHECKING:
    from multimodal_gen.engine.core import EngineCore

EXIT_LOAD_FAILED = 3
EXIT_SICK = 4
PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Serve one front over the inherited socket `argv[0]`, logging at level `argv[1]`; returns the exit code."""
    _die_with_parent()
    # The front decides when to stop; a Ctrl-C or a group-wide SIGTERM must not cut its drain short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = WorkerChannel(socket.socket(fileno=int(argv[0])))
    try:
        return _serve(channel, argv[1])
    except ChannelClosed:
        return 0


def _serve(channel: WorkerChannel, log_level: str) -> int:
    first, *rest = channel.receive(wait=True)
    assert isinstance(first, Load), "the front sends Load first"
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s worker %(levelname)s %(name)s: %(message)s")
    begin = time.monotonic()
    try:
        from multimodal_gen.engine.core import EngineCore

        core = EngineCore(first.card, first.config)
        lora_error = _bring_adapters(core, first)
    except MmgenError as error:
        channel.send(LoadFailed(ErrorInfo(error.code, error.message, error.param)))
        return EXIT_LOAD_FAILED
    except Exception as error:  # reported to the front, with the details in the log
        log.exception("loading failed")
        failure = GenerationFailed(f"The model could not be loaded ({type(error).__name__}: {error}).")
        channel.send(LoadFailed(ErrorInfo(failure.code, failure.message)))
        return EXIT_LOAD_FAILED
    info = core.pipeline.info
    channel.send(
        Ready(
            info.device,
            info.dtype,
            info.attention_backend,
            info.parameters,
            time.monotonic() - begin,
            threads=core.threads,
            targets=tuple(core.pipeline.trees),
            loras=core.loras.state,
            lora_error=lora_error,
        )
    )
    core.changes.on_staged = channel.wake
    return _loop(channel, core, rest)


def _bring_adapters(core: EngineCore, load: Load) -> ErrorInfo | None:
    """Adapters of the worker before this one, or of the configuration; only the latter may fail the start.

    Files that are gone are told in the state; an error here is one of merging.
    """
    try:
        core.bring_adapters(load.loras)
    except MmgenError as error:
        if load.loras is None:
            raise
        log.error("the adapters of the worker before could not be brought back: %s", error.message)
        return ErrorInfo(error.code, error.message, error.param)
    return None


def _loop(channel: WorkerChannel, core: EngineCore, messages: list[ToWorker]) -> int:
    stopping = False
    while True:
        for message in messages:
            if isinstance(message, Generate):
                _tell(channel, core.add(message.request, message.resume))
            elif isinstance(message, Cancel):
                _tell(channel, core.cancel(message.request_id))
            elif isinstance(message, ChangeLoras):
                core.changes.begin(message.id, message.change)
            elif isinstance(message, Shutdown):
                stopping = True
        _tell(channel, core.finish_changes())
        if core.idle and stopping:
            return 0
        if not core.idle:
            _tell(channel, core.step())
        if core.sick:
            log.error("%d requests failed in a row; this process ends", core.config.max_consecutive_errors)
            return EXIT_SICK
        messages = channel.receive(wait=core.idle and not stopping)


def _tell(channel: WorkerChannel, events: Iterable[Event]) -> None:
    for event in events:
        channel.send(event)


def _die_with_parent() -> None:
    """Linux: the kernel kills this process when its parent dies, even in the middle of a long step."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
