"""Groups of real worker processes under the engine's supervision: what one rank does to the others, and to requests."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from multimodal_gen.adapters import Change, MergeMode, UnloadLora
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.group import Placed
from multimodal_gen.engine.process import LocalProcesses
from multimodal_gen.errors import Cancelled, CorruptModel, GenerationFailed, MmgenError, OutOfMemory, WorkerCrashed
from multimodal_gen.generator import DiffGenerator
from multimodal_gen.lora.sources import set_change
from multimodal_gen.messages import Load
from multimodal_gen.pipelines import registry
from tests.support.adapters import linear_shapes, only, peft_tensors, write_adapter
from tests.support.checkpoints import PROMPT, make_z_image
from tests.support.engine import Running, forgive_deaths, running
from tests.support.server import wait_for

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STALL_S = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four attention heads, so that tp and ulysses may be 2 each."""
    return make_z_image(tmp_path_factory.mktemp("model") / "z")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, np.ndarray]:
    """What one process makes of the request that all tests send."""
    size = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1}
    with DiffGenerator.from_pretrained(str(folder), dtype="float32", threads=1) as generator:
        latents = generator.generate(PROMPT, output_type="latent", **size).latents
        assert latents is not None
        return {
            "latent": latents[0].numpy(),
            "pixels": generator.generate(PROMPT, output_type="np", **size).images[0],
        }


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> str:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    shapes = only(linear_shapes(model), "layers.")
    return str(write_adapter(tmp_path_factory.mktemp("adapters") / "a.safetensors", peft_tensors(shapes)))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Running]:
    """Two ranks that share every layer."""
    with pytest.MonkeyPatch.context() as patch:
        forgive_deaths(patch)
        with running(model_path=str(folder), tp_size=2, step_timeout_s=STALL_S) as engine:
            engine.wait_ready()
            yield engine


def assert_good(engine: Running, alone: dict[str, np.ndarray]) -> None:
    """The engine makes what one process makes."""
    assert np.abs(engine.make(output="latent") - alone["latent"]).max() < 1e-4
    assert np.abs(engine.make().astype(int) - alone["pixels"]).max() <= 1


def change(adapter: str | None, mode: MergeMode = "merge") -> Change:
    names = [] if adapter is None else ["a"]
    return set_change(names, None if adapter is None else [adapter], merge_mode=mode, roots=None, default_mode="auto")


def test_two_ranks_answer_like_one_process(pair: Running, alone: dict[str, np.ndarray]) -> None:
    assert_good(pair, alone)
    assert pair.client.restarts == 0
    assert pair.alive() == pair.pids()


def test_a_cancelled_request_ends_within_a_step_on_both_ranks(pair: Running, alone: dict[str, np.ndarray]) -> None:
    before, doomed, kept = pair.pids(), pair.submit(steps=900), pair.submit(steps=20)
    pair.first_step(doomed)
    started = time.monotonic()
    pair.cancel(doomed)
    with pytest.raises(Cancelled):
        pair.result(doomed, 5)
    assert time.monotonic() - started < 1
    assert pair.result(kept).shape == (64, 64, 3)
    assert_good(pair, alone)
    assert pair.pids() == before


def test_a_row_goes_on_on_both_ranks_where_a_checkpoint_left_it(pair: Running) -> None:
    whole = pair.make(steps=6, output="latent")
    begun = pair.submit(steps=6, output="latent", checkpoint_every=4)
    state = pair.checkpoint(begun)
    assert state.step == 4
    pair.result(begun)
    resumed = pair.submit([state], steps=6, output="latent")
    assert np.array_equal(pair.result(resumed), whole)
    assert resumed.steps_done == 2


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
def test_adapters_come_and_go_on_both_ranks(
    pair: Running, alone: dict[str, np.ndarray], adapter: str, folder: Path, mode: str
) -> None:
    base = pair.make(output="latent")
    assert pair.change(change(adapter, mode)).changed
    with DiffGenerator.from_pretrained(str(folder), dtype="float32", threads=1) as generator:
        generator.set_lora("a", adapter, merge_mode=mode)
        size = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1}
        want = generator.generate(PROMPT, output_type="latent", **size).latents[0].numpy()
    styled = pair.make(output="latent")
    assert np.abs(styled - want).max() < 1e-4
    assert np.abs(styled - base).max() > 0.1
    assert pair.change(change(None)).changed
    assert np.array_equal(pair.make(output="latent"), base), "the base weights are not what they were"
    pair.change(UnloadLora(nickname="a"))


@pytest.mark.parametrize("stage", ["adapter", "merge"])
def test_a_change_that_fails_on_one_rank_changes_none(pair: Running, adapter: str, stage: str) -> None:
    pair.start_again(f"{stage}:raise:1@1")
    base, before = pair.make(output="latent"), pair.pids()
    with pytest.raises(MmgenError):
        pair.change(change(adapter))
    assert pair.client.loras.active == ()
    assert np.array_equal(pair.make(output="latent"), base)
    assert pair.change(change(adapter)).changed
    assert not np.array_equal(pair.make(output="latent"), base)
    pair.change(change(None))
    pair.change(UnloadLora(nickname="a"))  # the next group would load it again
    assert pair.pids() == before


@pytest.mark.parametrize(
    ("fault", "error"), [("prepare:raise:1@1", GenerationFailed), ("decode:oom:1@1", OutOfMemory)], ids=str
)
def test_what_fails_on_one_rank_outside_a_collective_is_agreed_on(
    pair: Running, alone: dict[str, np.ndarray], fault: str, error: type[MmgenError]
) -> None:
    pair.start_again(fault)
    before = pair.pids()
    with pytest.raises(error) as caught:
        pair.make()
    assert type(caught.value) is error
    assert_good(pair, alone)
    assert pair.pids() == before


def test_what_fails_on_one_rank_while_the_other_waits_for_it_ends_both(
    pair: Running, alone: dict[str, np.ndarray]
) -> None:
    pair.start_again("denoise:oom:1@1")
    started = time.monotonic()
    with pytest.raises(WorkerCrashed):
        pair.make()
    assert time.monotonic() - started < STALL_S + 5
    assert_good(pair, alone)
    assert pair.alive() == pair.pids()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stopped_while_idle_costs_no_request(
    pair: Running, alone: dict[str, np.ndarray], rank: int
) -> None:
    pair.wait_ready()
    before = pair.signal(signal.SIGSTOP, rank)
    # The ranks cannot take the request together, so it has not started, and waits for the next group.
    assert np.abs(pair.make().astype(int) - alone["pixels"]).max() <= 1
    assert pair.alive() == pair.pids() != before


def test_a_rank_that_stops_in_the_middle_of_a_step_is_found(pair: Running, alone: dict[str, np.ndarray]) -> None:
    pair.wait_ready()
    doomed = pair.submit(steps=900)
    pair.first_step(doomed)
    pair.signal(signal.SIGSTOP, 1)
    started = time.monotonic()
    with pytest.raises(WorkerCrashed):
        pair.result(doomed)
    assert time.monotonic() - started < STALL_S + 5
    assert_good(pair, alone)
    assert pair.alive() == pair.pids()


class StopsOne:
    """A place whose first group has a rank that never comes to load anything."""

    def __init__(self, engine: Running) -> None:
        self.engine = engine
        self.place = engine.client.replicas[0].place
        self.stopped: list[int] = []

    async def start(self, load: Load) -> Placed:
        placed = await self.place.start(load)
        replica = self.engine.client.replicas[0]
        limit = 600.0 if self.stopped else 2.0
        config = msgspec.structs.replace(replica._load.config, load_timeout_s=limit)
        replica._load = msgspec.structs.replace(replica._load, config=config)
        if not self.stopped:
            self.stopped = [worker.pid for worker in placed.workers]
            os.kill(self.stopped[1], signal.SIGSTOP)
        return placed


def test_a_rank_that_stops_before_it_is_ready_is_found(pair: Running, alone: dict[str, np.ndarray]) -> None:
    replica = pair.client.replicas[0]
    place = replica.place
    replica.place = StopsOne(pair)
    before = pair.client.restarts
    pair.signal(signal.SIGKILL)
    wait_for(lambda: pair.client.restarts >= before + 2, 60, "the second restart")
    pair.wait_ready()
    replica.place = place
    assert_good(pair, alone)
    assert pair.alive() == pair.pids()


def test_each_of_four_ranks_may_die_at_any_stage(
    folder: Path, alone: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    forgive_deaths(monkeypatch)
    loading = [f"load:kill:1@{rank}" for rank in (0, 3)]  # the one that leads, and another
    working = ["denoise:kill:1@0", "denoise:kill:1@2", "decode:kill:1@1", "decode:kill:1@3"]
    with running(*loading, *working, model_path=str(folder), tp_size=2, ulysses_degree=2) as engine:
        engine.wait_ready()
        assert engine.client.restarts == len(loading), "each of these faults ended one group"
        for number, killed in enumerate(working):
            engine.wait_ready()
            assert engine.client.restarts == len(loading) + number, killed
            started = time.monotonic()
            with pytest.raises(WorkerCrashed):
                engine.make()
            assert time.monotonic() - started < 5, killed
            wait_for(lambda: engine.client.state == "restarting", 5, "the restart")
        assert_good(engine, alone)


def test_a_model_that_one_rank_cannot_load_fails_the_start(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    with running(model_path=str(broken), tp_size=2) as engine:
        for file in (broken / "transformer").glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(CorruptModel):
            engine.do(engine.client.wait_ready())
        assert engine.client.state == "failed"


def test_the_folder_where_ranks_meet_is_private_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = EngineConfig(tp_size=2)

    async def main() -> None:
        placed = await LocalProcesses(2, 0, "error").start(Load(registry.describe(config), config))
        (folder,) = tmp_path.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for worker in placed.workers:
            worker.kill()
        await asyncio.gather(*(worker.stop(5) for worker in placed.workers))
        placed.release()
        assert not list(tmp_path.iterdir())

    asyncio.run(main())
