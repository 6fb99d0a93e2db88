"""One worker process and the socket to it."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from multimodal_gen.config import worker_environment
from multimodal_gen.engine.channel import ChannelClosed, pack, read_frame
from multimodal_gen.messages import FromWorker, decode_from_worker

WATCH_SECONDS = 1.0
PACKAGE = Path(__file__).resolve().parent.parent
# The worker imports this very package, and nothing from the current folder, which may be a downloaded model's: `-m`
# would put that folder first on the path, and a torch.py in it would run.
LAUNCH = """
import sys
sys.path = [sys.argv[1], *filter(None, sys.path)]
import multimodal_gen
sys.path.pop(0)
from multimodal_gen.engine.worker import main
sys.exit(main(sys.argv[2:]))
"""

log = logging.getLogger(__name__)


class WorkerProcess:
    """Spawned, never forked: a worker starts from a clean interpreter and inherits one socket."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, log_level: str) -> WorkerProcess:
        """Spawn a Python that runs `engine.worker.main`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            command = (sys.executable, "-c", LAUNCH, str(PACKAGE.parent), str(theirs.fileno()), log_level)
            process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, env=worker_environment()
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, message: object) -> None:
        """Queue a message; one to a dead worker is lost, and its death is seen by `messages`."""
        if not self._writer.is_closing():
            self._writer.write(pack(message))

    async def messages(self, stall_limit: Callable[[], float | None]) -> AsyncIterator[FromWorker]:
        """What the worker says, until it dies or has been silent for longer than `stall_limit()` seconds."""
        silent = 0.0
        frame = asyncio.ensure_future(read_frame(self._reader))
        try:
            while True:
                done, _ = await asyncio.wait([frame], timeout=WATCH_SECONDS)
                if not done:
                    limit = stall_limit()
                    silent = 0.0 if limit is None else silent + WATCH_SECONDS
                    if limit is not None and silent >= limit:
                        log.error("the worker has been silent for %g s in the middle of its work; killing it", silent)
                        self.kill()
                        return
                    continue
                silent = 0.0
                yield decode_from_worker(frame.result())
                frame = asyncio.ensure_future(read_frame(self._reader))
        except ChannelClosed:
            return
        except msgspec.DecodeError as error:
            log.error("the worker sent something that is no message (%s); killing it", error)
            self.kill()
        finally:
            frame.cancel()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._process.returncode is None:
            self._process.kill()

    async def stop(self, patience_s: float) -> int:
        """Wait for the process to end, kill it when it does not; returns its exit code."""
        try:
            await asyncio.wait_for(self._process.wait(), patience_s)
        except asyncio.TimeoutError:
            self.kill()
        code = await self._process.wait()
        self._writer.close()
        return code
