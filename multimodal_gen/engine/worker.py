"""The worker process, started by `engine.process` with an inherited socket: one rank of a replica.

It reads `Load` first and meets the other ranks. Then it takes turns: what has arrived, one step, again. Rank 0 looks
for messages and sleeps in `poll` when there is nothing to do; the others wait for its turns. It exits when its front is
gone, and when the ranks cannot go on together.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from multimodal_gen.engine.channel import ChannelClosed, WorkerChannel
from multimodal_gen.errors import GenerationFailed, MmgenError, PeerLost
from multimodal_gen.messages import ErrorInfo, Event, Load, LoadFailed, Progress, Shutdown, ToWorker, Turn
from multimodal_gen.observe.status_log import StatusLog, open_status_log

if TYPE_CHECKING:
    from multimodal_gen.engine.host import Host

EXIT_LOAD_FAILED = 3
EXIT_SICK = 4
PR_SET_PDEATHSIG = 1
STAGING_SECONDS = 0.02  # between looks at whether the other ranks have staged a change of adapters

log = logging.getLogger(__name__)


class TurnClock:
    """The time of this turn as rank 0 read it: what depends on the clock must be decided alike on all ranks."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


def main(argv: list[str]) -> None:
    """Serve one front over the inherited socket `argv[0]`, logging at level `argv[1]`, and exit."""
    _die_with_parent()
    # The front decides when to stop; a Ctrl-C or a group-wide SIGTERM must not cut its drain short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = WorkerChannel(socket.socket(fileno=int(argv[0])))
    code = 0
    with contextlib.suppress(ChannelClosed):
        code = serve(channel, argv[1])
    # Taking torch's modules apart takes a second, and there is nothing in them that has to be saved.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(channel: WorkerChannel, log_level: str) -> int:
    """Load what the first message says and run until the end; returns the exit code. Raises: ChannelClosed."""
    first, *rest = channel.receive(wait=True)
    assert isinstance(first, Load), "the front sends Load first"
    name = "worker" if first.seat.ranks == 1 else f"rank {first.seat.rank}"
    logging.basicConfig(level=log_level.upper(), format=f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s")
    try:
        return _run(channel, first, rest)
    except PeerLost as error:
        log.error("%s", error.message)
        return EXIT_SICK


def _run(channel: WorkerChannel, load: Load, rest: list[ToWorker]) -> int:
    begin, clock = time.monotonic(), TurnClock()
    try:
        host = _load(load, clock)
        lora_error = _bring_adapters(host, load)
    except PeerLost:
        raise
    except MmgenError as error:
        channel.send(LoadFailed(ErrorInfo(error.code, error.message, error.param)))
        return EXIT_LOAD_FAILED
    except Exception as error:  # reported to the front, with the details in the log
        log.exception("loading failed")
        failure = GenerationFailed(f"The model could not be loaded ({type(error).__name__}: {error}).")
        channel.send(LoadFailed(ErrorInfo(failure.code, failure.message)))
        return EXIT_LOAD_FAILED
    gc.freeze()  # what a loaded model is made of lives as long as this process: looking through it takes 0.15 s
    if host.ranks.leads:
        channel.send(msgspec.structs.replace(host.ready(time.monotonic() - begin), lora_error=lora_error))
        for changes in host.changes:
            changes.on_staged = channel.wake
    config, leads = load.config, host.ranks.leads  # the others know no more
    target = config.scheduler_status_target if leads else None
    status = open_status_log(target, config.scheduler_status_interval_s, load.replica, load.seat.rank)
    try:
        return _loop(channel, host, clock, config.max_consecutive_errors, rest, status)
    finally:
        if status is not None:
            status.close()


def _load(load: Load, clock: TurnClock) -> Host:
    import torch

    from multimodal_gen.engine.host import Host
    from multimodal_gen.engine.ranks import meet
    from multimodal_gen.nn.precision import resolve_device
    from multimodal_gen.parallel.plan import plan

    config = load.config
    device = resolve_device(config.device)
    if device.type == "cuda" and ":" not in config.device:
        config = msgspec.structs.replace(config, device=f"cuda:{load.seat.device}")
        device = resolve_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels in Triton start on the current one
    degrees = plan(load.config, load.card, text=load.text).degrees
    ranks = meet(load.seat, degrees, device, config.load_timeout_s, config.step_timeout_s)
    ranks.mesh = dataclasses.replace(ranks.mesh, loading=load.loading)
    host = Host(load.card, load.text, config, ranks, clock)
    ranks.all_here(config.load_timeout_s)
    return host


def _bring_adapters(host: Host, load: Load) -> ErrorInfo | None:
    """Adapters of the worker before this one, or of the configuration; only the latter may fail the start.

    Files that are gone are told in the state; an error here is one of merging.
    """
    if host.text is not None:
        host.text.bring_adapters(None if load.loras is None else load.loras.text)
    if host.pictures is None:
        return None
    try:
        host.pictures.bring_adapters(None if load.loras is None else load.loras.pictures)
    except PeerLost:
        raise
    except MmgenError as error:
        if load.loras is None:
            raise
        log.error("the adapters of the worker before could not be brought back: %s", error.message)
        return ErrorInfo(error.code, error.message, error.param)
    return None


def _loop(
    channel: WorkerChannel,
    host: Host,
    clock: TurnClock,
    most_errors: int,
    messages: list[ToWorker],
    status: StatusLog | None,
) -> int:
    ranks, stopping = host.ranks, False
    while True:
        asked = [message for message in messages if not isinstance(message, Load)]
        turn = ranks.share(Turn(time.monotonic(), asked) if ranks.leads else None)
        clock.now = turn.clock
        host.begin_turn()
        for message in turn.messages:
            if isinstance(message, Shutdown):
                stopping = True
            else:
                _tell(channel, host, host.take(message))
        _tell(channel, host, host.finish_changes())
        if host.idle and stopping:
            return 0
        if not host.idle:
            _tell(channel, host, host.step())
        if status is not None:
            status.note(host.idle, host.standings)
        if host.sick:
            log.error("%d requests failed in a row; this process ends", most_errors)
            return EXIT_SICK
        if ranks.leads:
            messages = _receive(channel, host, wait=host.idle and not stopping)


def _receive(channel: WorkerChannel, host: Host, *, wait: bool) -> list[ToWorker]:
    # Other ranks cannot wake this one.
    polls = wait and not host.ranks.alone and host.waits_for_ranks
    return channel.receive(wait=wait, timeout_s=STAGING_SECONDS if polls else None)


def _tell(channel: WorkerChannel, host: Host, events: Iterable[Event]) -> None:
    """Have things happen and tell the front; the other ranks only have them happen."""
    for event in events:
        if host.ranks.leads:
            channel.send(event, hold=isinstance(event, Progress) and event.more)
    channel.flush()


def _die_with_parent() -> None:
    """Linux: the kernel kills this process when its parent dies, even in the middle of a long step."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
