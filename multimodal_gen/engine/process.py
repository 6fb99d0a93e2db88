"""Ranks as processes of this machine, each with a socket to its front."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

import msgspec

from multimodal_gen.engine.channel import pack, read_frame
from multimodal_gen.engine.group import Placed
from multimodal_gen.environment import worker_environment
from multimodal_gen.messages import Load, Seat

PACKAGE = Path(__file__).resolve().parent.parent
# The worker imports this very package, and nothing from the current folder, which may be a downloaded model's: `-m`
# would put that folder first on the path, and a torch.py in it would run. The first thing it learns is to tell where it
# hangs, which may be an import.
LAUNCH = """
import sys
sys.path = [sys.argv[1], *filter(None, sys.path)]
import faulthandler, signal
faulthandler.register(signal.SIGUSR1)
import multimodal_gen
sys.path.pop(0)
from multimodal_gen.engine.worker import main
main(sys.argv[2:])
"""


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
        """Queue a message; one to a dead worker is lost, and its death is seen by `frame`."""
        if not self._writer.is_closing():
            self._writer.write(pack(message))

    async def frame(self) -> bytes:
        """The next message's bytes. Raises: ChannelClosed once the process has died."""
        return await read_frame(self._reader)

    def dump(self) -> None:
        """Have it write the stacks of its threads to stderr; one that is stopped, or hangs in the kernel, does not."""
        self._signal(signal.SIGUSR1)

    def kill(self) -> None:
        """SIGKILL, if it still runs; it ends a stopped process, too."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            # Not Popen.kill: it would take the exit code of a process that has just ended from whoever waits for it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    async def stop(self, patience_s: float) -> int:
        """Wait for the process to end, kill it when it does not; returns its exit code."""
        try:
            await asyncio.wait_for(self._process.wait(), patience_s)
        except asyncio.TimeoutError:
            self.kill()
        code = await self._process.wait()
        self._writer.close()
        return code


class LocalProcesses:
    """The ranks of one replica on this machine. They meet through a file in a folder that nobody else can enter."""

    def __init__(self, ranks: int, first_device: int, log_level: str) -> None:
        """`first_device`: CUDA index of rank 0; the others follow."""
        self.ranks = ranks
        self._first_device = first_device
        self._log_level = log_level

    async def start(self, load: Load) -> Placed:
        """Spawn the ranks and tell each what to load. Raises: OSError; nothing runs then."""
        folder = tempfile.mkdtemp(prefix="mmgen-ranks-") if self.ranks > 1 else None  # of mode 0700
        placed = Placed([], lambda: None if folder is None else shutil.rmtree(folder, ignore_errors=True))
        store = "" if folder is None else f"file://{folder}/store"
        try:
            for rank in range(self.ranks):
                worker = await WorkerProcess.start(self._log_level)
                placed.workers.append(worker)
                seat = Seat(rank, self.ranks, store, device=self._first_device + rank)
                worker.send(msgspec.structs.replace(load, seat=seat))
        except BaseException:
            for started in placed.workers:
                started.kill()
            placed.release()
            raise
        return placed
