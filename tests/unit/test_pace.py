"""A host waits for its GPU, a step behind, and for nothing on a CPU."""

from __future__ import annotations

import pytest
import torch

from multimodal_gen.engine.pace import Pace

pytestmark = [pytest.mark.unit]


def test_a_cpu_is_not_waited_for() -> None:
    pace = Pace("cpu")
    for _ in range(3):
        pace.after_step()
    assert pace._last is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_step_before_is_done_and_this_one_may_run() -> None:
    pace, made = Pace("cuda:0"), []
    for _ in range(3):
        torch.cuda._sleep(50_000_000)
        pace.after_step()
        made.append(pace._last)
    assert [event.query() for event in made] == [True, True, False]
    torch.cuda.synchronize()
