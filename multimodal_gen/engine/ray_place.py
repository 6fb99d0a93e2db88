"""Ranks as Ray actors: the same workers on any machine of a Ray cluster, one placement group per replica.

An actor runs `engine.worker.serve` in a thread, on one end of a socket pair of its own; its methods carry frames
between the other end and the front. The ranks meet through a TCPStore that rank 0's actor opens, and talk to one
another over gloo or NCCL, never through Ray.

Every machine must have this package and the model under the same path. Ray is imported only when it is used.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.channel import HEADER, ChannelClosed, pack
from multimodal_gen.engine.group import Placed
from multimodal_gen.errors import ConfigError
from multimodal_gen.messages import Load, Seat

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

# A method waits for none of another group: `serve` lasts as long as the actor, `receive` until there is something.
GROUPS = {"serve": 1, "send": 1, "receive": 1, "dump": 1}
STDERR = 2

log = logging.getLogger(__name__)


def check_ray() -> None:
    """Raises: ConfigError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--executor ray needs Ray, which is not installed: pip install 'multimodal-gen[ray]'.", param="executor"
        )


class Rank:
    """What lives in an actor."""

    def __init__(self, log_level: str) -> None:
        self._log_level = log_level
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = bytearray()
        self._store: TCPStore | None = None

    def where(self) -> tuple[str, str, int]:
        """Node id, address of the machine, process id."""
        import ray

        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid()

    def open_store(self, address: str) -> str:
        """Where the ranks meet; asked of rank 0, which keeps it open."""
        from torch._C._distributed_c10d import TCPStore

        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return f"tcp://{address}:{self._store.port}"

    def serve(self) -> int:
        """Be a worker until its end; returns the exit code."""
        from multimodal_gen.engine.channel import WorkerChannel
        from multimodal_gen.engine.worker import serve

        try:
            return serve(WorkerChannel(self._theirs), self._log_level)
        except ChannelClosed:
            return 0
        finally:
            self._theirs.close()

    def send(self, frame: bytes) -> None:
        """A frame from the front to the worker."""
        self._ours.sendall(frame)

    def dump(self) -> None:
        """Write the stacks of all threads to the actor's log."""
        faulthandler.dump_traceback(STDERR)

    def receive(self) -> list[bytes]:
        """Messages from the worker, at least one; none when it has ended."""
        while not (messages := self._complete()):
            data = self._ours.recv(1 << 20)
            if not data:
                return []
            self._buffer += data
        return messages

    def _complete(self) -> list[bytes]:
        found = []
        while len(self._buffer) >= HEADER.size:
            end = HEADER.size + HEADER.unpack(self._buffer[: HEADER.size])[0]
            if len(self._buffer) < end:
                break
            found.append(bytes(self._buffer[HEADER.size : end]))
            del self._buffer[:end]
        return found


class RayWorker:
    """One rank in an actor, as its group sees it."""

    def __init__(self, actor: Any, node: str, address: str, pid: int, own_node: str) -> None:
        self.address = address
        self._pid = pid
        self._actor = actor
        self._is_near = node == own_node
        self._ended = actor.serve.options(concurrency_group="serve").remote()
        self._frames: deque[bytes] = deque()

    @property
    def pid(self) -> int:
        """Process id, on the machine where it runs."""
        return self._pid

    def send(self, message: object) -> None:
        """Queue a message; one to a dead worker is lost."""
        self._actor.send.options(concurrency_group="send").remote(pack(message))

    async def frame(self) -> bytes:
        """The next message's bytes. Raises: ChannelClosed once it has died."""
        from ray.exceptions import RayError

        while not self._frames:
            try:
                self._frames += (found := await self._actor.receive.options(concurrency_group="receive").remote())
            except RayError:
                raise ChannelClosed("the actor is gone") from None
            if not found:
                raise ChannelClosed("the worker has ended")
        return self._frames.popleft()

    def dump(self) -> None:
        """Have it write the stacks of its threads to its log; one that holds the interpreter's lock does not."""
        self._actor.dump.options(concurrency_group="dump").remote()

    def kill(self) -> None:
        """End it at once."""
        import ray

        ray.kill(self._actor, no_restart=True)
        if self._is_near:
            # Ray asks the process, which a stopped one does not hear.
            try:
                os.kill(self._pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    async def stop(self, patience_s: float) -> int:
        """Wait for its end, kill it when it does not come; returns the exit code, -9 where it was killed."""
        from ray.exceptions import RayError

        try:
            code = int(await asyncio.wait_for(asyncio.wrap_future(self._ended.future()), patience_s))
        except (asyncio.TimeoutError, RayError):
            code = -signal.SIGKILL
        self.kill()
        return code


class RayActors:
    """The ranks of one replica in a placement group of its own."""

    def __init__(self, ranks: int, workers: int, config: EngineConfig, log_level: str) -> None:
        """`workers` are the ranks of all replicas. Raises: ConfigError where Ray is not installed."""
        check_ray()
        self.ranks = ranks
        self._workers = workers
        self._config = config
        self._log_level = log_level

    async def start(self, load: Load) -> Placed:
        """Place the ranks and tell each what to load. Raises: ConfigError for more than the cluster has; RayError."""
        await asyncio.to_thread(_connect)
        import ray
        from ray.util.placement_group import remove_placement_group

        bundle = self._bundle(ray.cluster_resources())
        placement = ray.util.placement_group([bundle] * self.ranks, strategy="PACK")
        placed = Placed([], lambda: remove_placement_group(placement))
        try:
            await asyncio.wait_for(_wait(placement.ready()), self._config.load_timeout_s)
            workers = [await self._place(placement, rank, bundle) for rank in range(self.ranks)]
            placed.workers += workers
            store = await _wait(workers[0]._actor.open_store.remote(workers[0].address)) if self.ranks > 1 else ""
            for rank, worker in enumerate(workers):
                # Ray shows an actor no CUDA device but its own.
                seat = Seat(rank, self.ranks, store, address=worker.address, device=0)
                worker.send(msgspec.structs.replace(load, seat=seat))
        except BaseException:
            for started in placed.workers:
                started.kill()
            placed.release()
            raise
        return placed

    def _bundle(self, cluster: dict[str, float]) -> dict[str, float]:
        """What one rank asks for."""
        device = self._config.device
        on_gpu = device.startswith("cuda") or (device == "auto" and cluster.get("GPU", 0) > 0)
        bundle = {"CPU": float(self._config.threads or 1), **({"GPU": 1.0} if on_gpu else {})}
        for name, amount in bundle.items():
            needed, there = amount * self._workers, cluster.get(name, 0)
            if needed > there:
                raise ConfigError(
                    f"{self._workers} ranks need {needed:g} {name} and the Ray cluster has {there:g}.",
                    param="executor",
                )
        return bundle

    async def _place(self, placement: Any, rank: int, bundle: dict[str, float]) -> RayWorker:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor = (
            ray.remote(concurrency_groups=GROUPS)(Rank)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank),
            )
            .remote(self._log_level)
        )
        node, address, pid = await asyncio.wait_for(_wait(actor.where.remote()), self._config.load_timeout_s)
        return RayWorker(actor, node, address, pid, ray.get_runtime_context().get_node_id())


_connecting = threading.Lock()  # several replicas start at the same time


def _connect() -> None:
    """Join the cluster of RAY_ADDRESS or the one that runs on this machine, or start one here."""
    import ray

    with _connecting:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, logging_level=logging.WARNING)


async def _wait(reference: Any) -> Any:
    return await asyncio.wrap_future(reference.future())
