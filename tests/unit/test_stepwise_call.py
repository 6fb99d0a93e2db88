"""A callback-driven loop in a thread, driven a step at a time from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from multimodal_gen.pipelines.diffusers_any.run import StepwiseCall

pytestmark = [pytest.mark.unit]


class Loop:
    """Stands for a diffusers pipeline: counts its steps, and notes when it was unwound."""

    def __init__(self, total: int, fail_at: int | None = None) -> None:
        self.total, self.fail_at = total, fail_at
        self.steps = 0
        self.unwound = False

    def __call__(self, on_step: Callable[..., Any]) -> str:
        try:
            for step in range(self.total):
                if step == self.fail_at:
                    raise ArithmeticError("step")
                self.steps += 1
                assert on_step(self, step, 0, {"latents": 1}) == {"latents": 1}
            return "image"
        finally:
            self.unwound = True


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def start(loop: Loop) -> StepwiseCall:
    return StepwiseCall(loop, lambda: loop.total)


@pytest.mark.parametrize("total", [1, 4, 5, 7, 8, 3])
def test_the_requested_steps_are_spread_over_the_pipelines_own(total: int) -> None:
    """A second-order solver takes 7 steps for 4, a few-step one 3 or 1: each advance does its share."""
    loop = Loop(total)
    call = start(loop)
    seen = []
    for step in range(1, 5):
        call.advance(step, 4)
        seen.append(loop.steps)
    assert seen == [max(1, total * step // 4) for step in range(1, 5)]
    assert call.finish() == "image"
    assert loop.steps == total


def test_nothing_runs_before_it_is_asked_to() -> None:
    loop = Loop(3)
    call = start(loop)
    assert loop.steps == 0
    call.cancel()
    assert loop.steps == 0


@pytest.mark.parametrize("done", [1, 2, 3])
def test_cancel_unwinds_the_call(done: int) -> None:
    loop = Loop(3)
    call = start(loop)
    call.advance(done, 3)
    assert not loop.unwound
    call.cancel()
    assert loop.unwound
    assert loop.steps == done


def test_cancel_is_no_exception_that_the_pipeline_could_catch() -> None:
    caught = []

    def stubborn(on_step: Callable[..., Any]) -> None:
        for step in range(3):
            try:
                on_step(step, 0, None)
            except Exception as error:
                caught.append(error)
                raise

    call = StepwiseCall(stubborn, lambda: 3)
    call.advance(1, 3)
    call.cancel()
    assert not caught


def test_cancel_after_the_end_and_after_an_error_is_harmless() -> None:
    done = start(Loop(2))
    assert done.finish() == "image"
    done.cancel()
    broken = start(Loop(2, fail_at=0))
    with pytest.raises(ArithmeticError):
        broken.advance(1, 2)
    broken.cancel()


@pytest.mark.parametrize("fail_at", [0, 2])
def test_an_error_surfaces_in_the_caller_and_stays(fail_at: int) -> None:
    call = start(Loop(4, fail_at=fail_at))
    for step in range(1, fail_at + 1):
        call.advance(step, 4)
    for _ in range(2):  # a second try must not wait for a thread that has ended
        with pytest.raises(ArithmeticError):
            call.advance(fail_at + 1, 4)
    with pytest.raises(ArithmeticError):
        call.finish()
