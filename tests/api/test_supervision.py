"""The engine client and its worker process, without HTTP: every way for a worker to go wrong."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from multimodal_gen.config import ServerConfig
from multimodal_gen.engine.client import EngineClient
from multimodal_gen.engine.ticket import Ticket
from multimodal_gen.errors import Cancelled, ModelLoading, WorkerCrashed
from multimodal_gen.messages import Progress
from multimodal_gen.request import SamplingParams
from multimodal_gen.resolve import resolve

pytestmark = [pytest.mark.api]


@asynccontextmanager
async def engine(**settings: object) -> AsyncIterator[EngineClient]:
    client = EngineClient(ServerConfig(dtype="float32", threads=1, log_level="error", **settings))
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def submit(client: EngineClient, name: str, steps: int = 2, priority: int = 0) -> Ticket:
    params = SamplingParams(width=64, height=64, num_inference_steps=steps, seed=1, priority=priority)
    request = resolve(request_id=name, prompt="a rocket", params=params, card=client.card, max_cost=10**9)
    return client.submit(request)


async def first_step(ticket: Ticket) -> None:
    async for event in ticket:
        if isinstance(event, Progress):
            return


def test_a_crash_while_loading_is_tried_again() -> None:
    async def main() -> None:
        async with engine(fault="load:kill:1") as client:
            with pytest.raises(ModelLoading):
                submit(client, "early")
            while client.restarts == 0:
                await asyncio.sleep(0.05)
            with pytest.raises(ModelLoading):
                submit(client, "still early")
            assert client.admitted.pictures_cost == 0
            await client.wait_ready()
            assert (await submit(client, "a").result()).outputs

    asyncio.run(main())


def test_a_worker_that_froze_while_idle_is_replaced() -> None:
    async def main() -> None:
        async with engine(step_timeout_s=3.0) as client:
            await client.wait_ready()
            frozen = client.worker_pid
            assert frozen is not None
            os.kill(frozen, signal.SIGSTOP)
            finished = await asyncio.wait_for(submit(client, "a").result(), 60)
            assert finished.outputs
            assert client.worker_pid != frozen

    asyncio.run(main())


def test_a_cancel_holds_even_if_the_worker_dies_before_it_obeys() -> None:
    async def main() -> None:
        async with engine(step_timeout_s=3.0) as client:
            await client.wait_ready()
            assert client.worker_pid is not None
            os.kill(client.worker_pid, signal.SIGSTOP)
            dropped, kept = submit(client, "dropped"), submit(client, "kept")
            dropped.cancel()
            with pytest.raises(Cancelled):
                await asyncio.wait_for(dropped.result(), 60)
            assert (await asyncio.wait_for(kept.result(), 60)).outputs

    asyncio.run(main())


def test_a_crash_fails_what_had_started_and_keeps_what_waits() -> None:
    async def main() -> None:
        async with engine(max_batch_tokens=1) as client:
            await client.wait_ready()
            running, waiting = submit(client, "running", steps=400), submit(client, "waiting", priority=-1)
            await first_step(running)
            assert client.worker_pid is not None
            os.kill(client.worker_pid, signal.SIGKILL)
            with pytest.raises(WorkerCrashed):
                await asyncio.wait_for(running.result(), 5)
            assert (await asyncio.wait_for(waiting.result(), 60)).outputs
            assert client.restarts == 1
            assert client.admitted.pictures_cost == 0

    asyncio.run(main())


def test_files_of_the_current_folder_are_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import pathlib; pathlib.Path('executed').touch()")
    (tmp_path / "msgspec.py").write_text("import pathlib; pathlib.Path('executed').touch()")
    monkeypatch.chdir(tmp_path)

    async def main() -> None:
        async with engine() as client:
            await client.wait_ready()

    asyncio.run(main())
    assert not (tmp_path / "executed").exists()
