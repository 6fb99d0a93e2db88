"""Several replicas behind one engine: they work at the same time, and one that dies takes only its own work down."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from multimodal_gen.adapters import SetLora, UnloadLora
from multimodal_gen.errors import MmgenError, ModelLoading, WorkerCrashed
from multimodal_gen.lora.sources import set_change
from tests.support.adapters import linear_shapes, only, peft_tensors, write_adapter
from tests.support.checkpoints import make_z_image
from tests.support.engine import Running, forgive_deaths, running
from tests.support.server import wait_for

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LONG = 900  # steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_z_image(tmp_path_factory.mktemp("model") / "z")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> list[str]:
    from diffusers import ZImageTransformer2DModel

    shapes = only(linear_shapes(ZImageTransformer2DModel.from_pretrained(folder / "transformer")), "layers.")
    base = tmp_path_factory.mktemp("adapters")
    return [str(write_adapter(base / f"{seed}.safetensors", peft_tensors(shapes, seed=seed))) for seed in (1, 2)]


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        forgive_deaths(patch)
        with running(model_path=str(folder), dp_size=2, max_batch_tokens=100, step_timeout_s=4.0) as engine:
            engine.wait_ready()
            yield engine


def holding(engine: Running) -> list[int]:
    """Requests in the hands of each replica."""
    return [len(replica.tickets) for replica in engine.client.replicas]


def from_both(engine: Running) -> list[np.ndarray]:
    """The same request from each replica."""
    tickets = [engine.submit(output="latent", steps=30) for _ in range(2)]
    assert holding(engine) == [1, 1]
    return [engine.result(ticket) for ticket in tickets]


def set_to(path: str | None) -> SetLora:
    names = [] if path is None else ["a"]
    return set_change(names, None if path is None else [path], merge_mode="merge", roots=None, default_mode="auto")


def test_two_replicas_work_at_the_same_time(two: Running) -> None:
    first, second = two.submit(steps=LONG), two.submit(steps=LONG)
    two.first_step(first)
    two.first_step(second)
    assert holding(two) == [1, 1]
    assert two.client.admitted.pictures_running == 2
    two.cancel(first)
    wait_for(lambda: holding(two) == [0, 1], 5, "the cancel")
    third = two.submit(steps=LONG)
    wait_for(lambda: holding(two) == [1, 1], 5, "dispatch to the idle one")
    for ticket in (second, third):
        two.cancel(ticket)
    wait_for(lambda: two.client.admitted.pictures_cost == 0, 5, "the cancels")


def test_the_work_of_a_dead_replica_goes_on_elsewhere(two: Running) -> None:
    two.wait_ready()
    running_, other = two.submit(steps=LONG), two.submit(steps=LONG)
    two.first_step(running_)
    two.first_step(other)
    # Longer than what one of the two may be ahead by on a busy machine.
    waiting = [two.submit(steps=40, priority=-1) for _ in range(4)]
    assert holding(two) == [3, 3]
    kept, before = two.pids(1), two.client.restarts
    assert running_.replica is two.client.replicas[0]
    two.signal(signal.SIGKILL, replica=0)
    with pytest.raises(WorkerCrashed):
        two.result(running_, 5)
    wait_for(lambda: holding(two)[1] == 5, 5, "the waiting requests to move")
    assert two.client.state == "ready", "one replica is enough to take requests"
    two.cancel(other)
    for ticket in waiting:
        assert two.result(ticket).shape == (64, 64, 3)
    two.wait_ready()
    assert two.pids(1) == kept
    assert two.client.restarts == before + 1
    assert two.make().shape == (64, 64, 3)


def test_while_no_replica_is_ready_requests_wait(two: Running) -> None:
    two.wait_ready()
    for replica in range(2):
        two.signal(signal.SIGKILL, replica=replica)
    wait_for(lambda: two.client.state == "restarting", 5, "both deaths")
    tickets = [two.submit() for _ in range(3)]
    assert holding(two) == [0, 0]
    dropped = two.submit()
    two.cancel(dropped)
    with pytest.raises(MmgenError):
        two.result(dropped, 5)
    for ticket in tickets:
        assert two.result(ticket).shape == (64, 64, 3)


def test_adapters_change_in_all_replicas(two: Running, adapters: list[str]) -> None:
    two.wait_ready()
    base = from_both(two)
    assert np.array_equal(*base)
    assert two.change(set_to(adapters[0])).changed
    styled = from_both(two)
    assert np.array_equal(*styled)
    assert not np.array_equal(styled[0], base[0])
    two.change(set_to(None))
    assert np.array_equal(from_both(two), base)
    two.change(UnloadLora(nickname="a"))


def test_a_change_that_one_replica_refuses_is_taken_back_in_the_other(two: Running, adapters: list[str]) -> None:
    two.wait_ready()
    base = from_both(two)
    two.start_again("adapter:raise:1")
    with pytest.raises(MmgenError):
        two.change(set_to(adapters[0]))
    pictures = [replica.adapters.pictures for replica in two.client.replicas]
    assert [(each.loaded, each.active) for each in pictures] == [((), ())] * 2
    assert np.array_equal(from_both(two), base)
    assert two.change(set_to(adapters[0])).changed


def test_a_change_during_which_one_replica_dies_is_taken_back_in_the_other(two: Running, adapters: list[str]) -> None:
    two.wait_ready()
    two.change(set_to(adapters[0]))
    styled, active = from_both(two), two.client.loras.active
    two.signal(signal.SIGSTOP, replica=1)
    with pytest.raises(WorkerCrashed):
        two.change(set_to(adapters[1]))
    two.wait_ready()
    assert [replica.adapters.pictures.active for replica in two.client.replicas] == [active] * 2
    assert np.array_equal(from_both(two), styled)


def test_adapters_do_not_change_while_a_replica_is_away(two: Running, adapters: list[str]) -> None:
    two.wait_ready()
    two.change(set_to(adapters[0]))
    two.signal(signal.SIGKILL, replica=1)
    wait_for(lambda: two.client.replicas[1].state == "restarting", 5, "the death")
    with pytest.raises(ModelLoading):
        two.change(set_to(adapters[1]))
    two.wait_ready()
    assert two.change(set_to(adapters[1])).changed
    assert np.array_equal(*from_both(two))
