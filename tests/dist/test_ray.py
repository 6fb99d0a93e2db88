"""The same workers as Ray actors, on a Ray instance of this machine."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from multimodal_gen.config import ServerConfig
from multimodal_gen.engine.client import EngineClient
from multimodal_gen.errors import Cancelled, ConfigError, WorkerCrashed
from multimodal_gen.generator import DiffGenerator
from tests.support.checkpoints import PROMPT, make_z_image
from tests.support.engine import Running, forgive_deaths, running
from tests.support.server import wait_for

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STALL_S = 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_z_image(tmp_path_factory.mktemp("model") / "z")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two cores, whatever the machine has."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="warning", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pair(folder: Path, cluster: None) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        forgive_deaths(patch)
        with running(model_path=str(folder), tp_size=2, executor="ray", step_timeout_s=STALL_S) as engine:
            engine.wait_ready()
            yield engine


@pytest.fixture(scope="module")
def alone(folder: Path) -> np.ndarray:
    with DiffGenerator.from_pretrained(str(folder), dtype="float32", threads=1) as generator:
        made = generator.generate(PROMPT, width=64, height=64, num_inference_steps=2, seed=1, output_type="latent")
        assert made.latents is not None
        return made.latents[0].numpy()


def assert_good(engine: Running, alone: np.ndarray) -> None:
    assert np.abs(engine.make(output="latent") - alone).max() < 1e-4


def test_two_actors_answer_like_one_process(pair: Running, alone: np.ndarray) -> None:
    assert_good(pair, alone)
    doomed = pair.submit(steps=900)
    pair.first_step(doomed)
    pair.cancel(doomed)
    with pytest.raises(Cancelled):
        pair.result(doomed, 5)
    assert_good(pair, alone)
    assert pair.client.restarts == 0


def test_an_actor_that_dies_takes_its_group_down_and_the_next_one_works(pair: Running, alone: np.ndarray) -> None:
    doomed = pair.submit(steps=900)
    pair.first_step(doomed)
    before = pair.signal(signal.SIGKILL, 1)
    with pytest.raises(WorkerCrashed):
        pair.result(doomed, 20)
    assert_good(pair, alone)
    wait_for(lambda: not set(before) & set(pair.alive()), 10, "the end of the others")


def test_an_actor_that_stops_is_found_and_ended(pair: Running, alone: np.ndarray) -> None:
    doomed = pair.submit(steps=900)
    pair.first_step(doomed)
    before = pair.signal(signal.SIGSTOP, 1)
    with pytest.raises(WorkerCrashed):
        pair.result(doomed, STALL_S + 10)
    assert_good(pair, alone)
    wait_for(lambda: not set(before) & set(pair.alive()), 10, "the end of the others")


def test_more_ranks_than_the_cluster_has_cores_are_refused(folder: Path, cluster: None) -> None:
    too_many = running(model_path=str(folder), tp_size=2, ulysses_degree=2, executor="ray")
    refused = pytest.raises(ConfigError, match="4 ranks need 4 CPU and the Ray cluster has 2")
    with too_many as engine, refused:
        engine.do(engine.client.wait_ready())


def test_without_ray_the_error_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'multimodal-gen\[ray\]'") as caught:
        EngineClient(ServerConfig(model_path=str(folder), executor="ray"))
    assert caught.value.param == "executor"
