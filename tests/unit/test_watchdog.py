"""Stacks of a process that is stuck, in a process of its own: there is one such timer in each."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.unit]


def run(code: str) -> str:
    """What it says on stderr."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


START = """
import time
from multimodal_gen.observe.watchdog import stacks_after
def slow_disk(seconds): time.sleep(seconds)
def fails(): raise RuntimeError("no model there")
"""


def test_a_start_that_hangs_says_where() -> None:
    said = run(START + "with stacks_after(0.2): slow_disk(1.5)")
    assert "Timeout (0:00:00.200000)!" in said
    assert " in slow_disk" in said


def test_a_start_in_time_says_nothing() -> None:
    assert run(START + "with stacks_after(30): slow_disk(0.1)") == ""


def test_a_start_that_fails_leaves_no_timer_behind() -> None:
    code = "try:\n with stacks_after(1.0): fails()\nexcept RuntimeError: pass\nslow_disk(1.5)"
    assert run(START + code) == ""


LOOP = """
import asyncio, logging, time
from multimodal_gen.observe.watchdog import watch_loop
logging.basicConfig()
def blocks(seconds): time.sleep(seconds)
async def main(seconds, limit):
    watching = asyncio.create_task(watch_loop(limit_s=limit, tick_s=0.05))
    await asyncio.sleep(0.2)
    blocks(seconds)
    await asyncio.sleep(0.2)
    watching.cancel()
    await asyncio.sleep(0.5)
"""


def test_an_event_loop_that_is_held_up_says_by_whom() -> None:
    said = run(LOOP + "asyncio.run(main(1.5, limit=0.3))")
    assert " in blocks" in said
    assert "the event loop was held up for" in said


def test_an_event_loop_that_turns_says_nothing() -> None:
    assert run(LOOP + "asyncio.run(main(0.3, limit=10.0))") == ""
