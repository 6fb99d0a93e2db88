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
from typing import TYPE_CHECKING

from multimodal_gen.engine.channel import ChannelClosed, WorkerChannel
from multimodal_gen.errors import GenerationFailed, MmgenError
from multimodal_gen.messages import Cancel, ErrorInfo, Generate, Load, LoadFailed, Ready, Shutdown, ToWorker

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
    except MmgenError as error:
        channel.send(LoadFailed(ErrorInfo(error.code, error.message, error.param)))
        return EXIT_LOAD_FAILED
    except Exception as error:  # reported to the front, with the details in the log
        log.exception("loading failed")
        failure = GenerationFailed(f"The model could not be loaded ({type(error).__name__}: {error}).")
        channel.send(LoadFailed(ErrorInfo(failure.code, failure.message)))
        return EXIT_LOAD_FAILED
    info = core.pipeline.info
    channel.send(Ready(info.device, info.dtype, info.attention_backend, info.parameters, time.monotonic() - begin))
    return _loop(channel, core, rest)


def _loop(channel: WorkerChannel, core: EngineCore, messages: list[ToWorker]) -> int:
    stopping = False
    while True:
        for message in messages:
            if isinstance(message, Generate):
                core.add(message.request)
            elif isinstance(message, Cancel):
                for event in core.cancel(message.request_id):
                    channel.send(event)
            elif isinstance(message, Shutdown):
                stopping = True
        if core.idle and stopping:
            return 0
        if not core.idle:
            for event in core.step():
                channel.send(event)
        if core.sick:
            log.error("%d requests failed in a row; this process ends", core.config.max_consecutive_errors)
            return EXIT_SICK
        messages = channel.receive(wait=core.idle and not stopping)


def _die_with_parent() -> None:
    """Linux: the kernel kills this process when its parent dies, even in the middle of a long step."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
