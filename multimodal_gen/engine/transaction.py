"""What all replicas do, or none: changes of adapters, waking. All of them can always sleep."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from multimodal_gen.adapters import Change, LoraStates, RestoreLora, Side
from multimodal_gen.engine.replica import Replica
from multimodal_gen.errors import MmgenError
from multimodal_gen.messages import LorasChanged, MemoryChanged

Result = TypeVar("Result")


async def change_all(replicas: Sequence[Replica], change: Change, side: Side, before: LoraStates) -> LorasChanged:
    """Make the change everywhere; where one replica refuses or dies, the others go back to `before`.

    Requests are told the new state only after this returns; those sent meanwhile have pinned the old one, and a replica
    keeps the adapters of the state before for them.
    Raises: the error of the first replica that failed.
    """
    outcomes = await asyncio.gather(*(replica.change(change, side) for replica in replicas), return_exceptions=True)
    done = [outcome for outcome in outcomes if isinstance(outcome, LorasChanged)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if not failed:
        seconds = max(outcome.seconds for outcome in done)
        return msgspec.structs.replace(done[0], seconds=seconds, changed=any(outcome.changed for outcome in done))
    changed = [replica for replica, outcome in zip(replicas, outcomes, strict=True) if outcome in done]
    await asyncio.gather(*(_bring_back(replica, side, before) for replica in changed))
    raise failed[0]


async def _bring_back(replica: Replica, side: Side, before: LoraStates) -> None:
    try:
        back = await replica.change(RestoreLora(state=before.of(side)), side)
    except MmgenError as error:
        replica.start_over(before, f"its adapters could not be brought back ({error.message})")
        return
    if (back.state.loaded, back.state.active) != (before.of(side).loaded, before.of(side).active):
        replica.start_over(before, "its adapters did not come back as they were")


async def sleep_all(replicas: Sequence[Replica]) -> MemoryChanged:
    """Give the memory of all replicas back; returns what they had, together."""
    outcomes = await asyncio.gather(*(replica.sleep() for replica in replicas))
    freed = sum(outcome.freed_bytes for outcome in outcomes)
    return MemoryChanged("", max(outcome.seconds for outcome in outcomes), freed)


async def wake_all(replicas: Sequence[Replica]) -> MemoryChanged:
    """Bring all replicas back; where one does not wake, all sleep on.

    Raises: the error of the first replica that failed.
    """
    outcomes = await asyncio.gather(*(replica.wake() for replica in replicas), return_exceptions=True)
    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if failed:
        await sleep_all(replicas)
        raise failed[0]
    return MemoryChanged("", max(outcome.seconds for outcome in outcomes if isinstance(outcome, MemoryChanged)))


def to_its_end(work: Coroutine[Any, Any, Result]) -> Awaitable[Result]:
    """Whoever asked for the work may leave; half of it must not stay behind."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to be told
    return asyncio.shield(task)
