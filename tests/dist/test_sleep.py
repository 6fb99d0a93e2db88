"""Groups of real worker processes that sleep: all ranks and replicas together, whatever becomes of one of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from multimodal_gen.errors import Asleep, OutOfMemory, WorkerCrashed
from multimodal_gen.generator import DiffGenerator
from multimodal_gen.lora.sources import set_change
from multimodal_gen.messages import MemoryChanged
from tests.support.adapters import make_adapter_for
from tests.support.checkpoints import PROMPT, make_z_image
from tests.support.engine import Running, forgive_deaths, running
from tests.support.server import wait_for

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_z_image(tmp_path_factory.mktemp("model") / "z")


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_adapter_for(folder, tmp_path_factory.mktemp("adapters") / "a.safetensors"))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Running]:
    """Two ranks that share every layer."""
    with pytest.MonkeyPatch.context() as patch:
        forgive_deaths(patch)
        with running(model_path=str(folder), tp_size=2, step_timeout_s=4.0) as engine:
            engine.wait_ready()
            yield engine


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Running]:
    """Two replicas."""
    with pytest.MonkeyPatch.context() as patch:
        forgive_deaths(patch)
        with running(model_path=str(folder), dp_size=2, max_batch_tokens=100, step_timeout_s=4.0) as engine:
            engine.wait_ready()
            yield engine


def sleep(engine: Running) -> MemoryChanged:
    async def ask() -> MemoryChanged:
        return await engine.client.sleep()

    return engine.do(ask())


def wake(engine: Running) -> MemoryChanged:
    async def ask() -> MemoryChanged:
        return await engine.client.wake()

    return engine.do(ask())


def assert_asleep(engine: Running) -> None:
    """As a whole: no rank holds weights, and no request is taken."""
    assert engine.client.state == "asleep"
    assert [replica.state for replica in engine.client.replicas] == ["asleep"] * len(engine.client.replicas)
    assert engine.client.weights.device_bytes == 0
    with pytest.raises(Asleep):
        engine.submit()


def test_two_ranks_come_back_bit_for_bit_with_their_adapters(pair: Running, adapter: str) -> None:
    pair.change(set_change("a", adapter, merge_mode="merge", roots=None, default_mode="auto"))
    before, pids = pair.make(output="latent"), pair.pids()
    freed = sleep(pair).freed_bytes
    assert_asleep(pair)
    wake(pair)
    assert freed > 1.2 * pair.client.weights.device_bytes, "of both ranks; the gauge shows the first"
    assert np.array_equal(pair.make(output="latent"), before)
    assert pair.pids() == pids


def test_a_long_sleep_is_no_silence(pair: Running) -> None:
    pids = pair.pids()
    sleep(pair)
    time.sleep(6.0)  # the limit of silence is 4 s
    assert pair.pids() == pids
    assert_asleep(pair)
    wake(pair)
    assert pair.make().shape == (64, 64, 3)


def test_a_rank_that_cannot_wake_keeps_all_asleep(pair: Running) -> None:
    before = pair.make(output="latent")
    pair.start_again("wake:oom:1@1")
    pids = pair.pids()
    sleep(pair)
    with pytest.raises(OutOfMemory):
        wake(pair)
    assert_asleep(pair)
    wake(pair)
    assert np.array_equal(pair.make(output="latent"), before)
    assert pair.pids() == pids


def test_a_rank_that_dies_while_it_wakes_leaves_all_asleep(pair: Running) -> None:
    before = pair.make(output="latent")
    pair.start_again("wake:kill:1@1")
    sleep(pair)
    with pytest.raises(WorkerCrashed):
        wake(pair)
    assert_asleep(pair)
    assert pair.alive() == []
    wake(pair)
    assert np.array_equal(pair.make(output="latent"), before)


def test_waking_has_the_time_of_loading_and_no_more(folder: Path) -> None:
    with running("wake:hang:1", model_path=str(folder), step_timeout_s=1.0) as engine:
        engine.wait_ready()
        sleep(engine)
        (replica,) = engine.client.replicas
        patient = replica._load
        hurried = msgspec.structs.replace(patient.config, load_timeout_s=4.0)
        replica._load = msgspec.structs.replace(patient, config=hurried)
        began = time.monotonic()
        with pytest.raises(WorkerCrashed):
            wake(engine)
        assert time.monotonic() - began > 2.9, "a look at it may be almost due"
        assert_asleep(engine)
        replica._load = patient
        wake(engine)
        assert engine.client.state == "ready"


def test_replicas_sleep_and_wake_together(two: Running) -> None:
    before = [two.submit(output="latent", steps=30) for _ in range(2)]
    freed = sleep(two).freed_bytes
    results = [two.result(ticket) for ticket in before]
    assert np.array_equal(*results)
    assert_asleep(two)
    wake(two)
    assert freed >= two.client.weights.device_bytes > 0
    assert [replica.state for replica in two.client.replicas] == ["ready"] * 2
    again = [two.submit(output="latent", steps=30) for _ in range(2)]
    assert [np.array_equal(two.result(ticket), results[0]) for ticket in again] == [True, True]


def test_a_replica_that_cannot_wake_keeps_the_other_asleep(two: Running) -> None:
    two.start_again("wake:oom:1")
    sleep(two)
    with pytest.raises(OutOfMemory):
        wake(two)
    assert_asleep(two)
    wake(two)
    assert two.make().shape == (64, 64, 3)


def test_a_replica_that_is_restarting_is_ended_to_sleep(two: Running) -> None:
    kept = two.pids(1)
    two.signal(signal.SIGKILL)
    wait_for(lambda: two.client.replicas[0].state == "restarting", 5, "the death")
    sleep(two)
    assert_asleep(two)
    assert two.alive() == kept
    wake(two)
    assert [replica.state for replica in two.client.replicas] == ["ready"] * 2
    assert two.pids(1) == kept
    assert two.make().shape == (64, 64, 3)


def test_python_callers_put_their_workers_to_sleep(folder: Path, adapter: str) -> None:
    size = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    with DiffGenerator.from_pretrained(str(folder), dtype="float32", threads=1, tp_size=2) as generator:
        generator.set_lora("a", adapter, merge_mode="merge")
        before = generator.generate(PROMPT, **size).latents
        assert before is not None
        assert generator.sleep() > 0
        assert generator.sleep() == 0
        with pytest.raises(Asleep):
            generator.generate(PROMPT, **size)
        with pytest.raises(Asleep):
            generator.set_lora([])
        generator.wake()
        after = generator.generate(PROMPT, **size).latents
        assert after is not None
        assert before.equal(after)
