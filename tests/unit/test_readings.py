"""What replicas tell of themselves: nothing of a dead one is shown, nothing that was counted is lost."""

from __future__ import annotations

import msgspec
import pytest

from multimodal_gen.engine.readings import Readings, total, total_use
from multimodal_gen.messages import Gauges, MemoryChanged
from multimodal_gen.offload import WeightsUse

pytestmark = [pytest.mark.unit]

USE = WeightsUse(100, 20, 30, 40, moved_bytes=500, loads=5, stall_seconds=0.5)
STEP = Gauges(1, 2, 0.5, 1, 100, 10, 3, 4, step_stall_seconds=0.25, weights=USE)


def test_every_field_of_several_replicas_adds_up() -> None:
    both = total_use([USE, USE])
    assert msgspec.structs.astuple(both) == tuple(2 * value for value in msgspec.structs.astuple(USE))
    assert total_use([]) == WeightsUse()
    assert both.tiers == {"device": 200, "pinned": 40, "pageable": 60, "file": 80}


def test_the_longest_step_and_the_longest_stall_show() -> None:
    other = msgspec.structs.replace(STEP, step_seconds=0.1, step_stall_seconds=0.3)
    found = total([STEP, other])
    assert found is not None
    assert (found.step_seconds, found.step_stall_seconds) == (0.5, 0.3)
    assert found.weights == total_use([USE, USE])
    assert found.cache_bytes == 20


def test_a_dead_group_holds_nothing_but_has_moved_what_it_moved() -> None:
    readings = Readings()
    readings.note(STEP)
    assert readings.weights == USE
    readings.forget()
    assert readings.gauges is None
    assert readings.weights == WeightsUse(moved_bytes=500, loads=5, stall_seconds=0.5)
    readings.note(STEP)
    readings.forget()
    readings.forget()
    assert readings.weights == WeightsUse(moved_bytes=1000, loads=10, stall_seconds=1.0)


def test_after_a_sleep_no_gauge_is_stale() -> None:
    readings = Readings()
    readings.note(STEP)
    readings.note(MemoryChanged("", 0.1, 150, WeightsUse(moved_bytes=500)))
    assert readings.gauges is not None
    assert readings.gauges.cache_bytes == 0
    assert readings.weights == WeightsUse(moved_bytes=500)
