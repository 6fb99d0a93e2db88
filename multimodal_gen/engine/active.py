"""What the engine keeps of a request while it works on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from multimodal_gen.engine.scheduler import Scheduler
from multimodal_gen.lora.applied import Applied
from multimodal_gen.media.arrays import from_numpy, to_numpy
from multimodal_gen.messages import Array, Gauges, RowState
from multimodal_gen.pipelines.contract import CacheUse, Conditions, Row
from multimodal_gen.request import AnyRequest, Timings


@dataclass
class Active:
    """A request that the engine holds."""

    request: AnyRequest  # filled by add
    arrived: float  # filled by add: monotonic seconds
    adapters: Applied  # filled by add; overlays when the first row starts
    unpin: Callable[[], None]  # filled by add: lets go of the request's adapters
    states: dict[int, RowState]  # filled by add: where rows go on that another process has begun
    started: bool = False  # set when its first row is planned
    rows: dict[int, Row] = field(default_factory=dict)  # filled when a row starts, emptied when it is decoded
    outputs: dict[int, Array] = field(default_factory=dict)  # filled when a row is decoded whose pixels have not left
    timings: Timings = field(default_factory=Timings)  # filled step by step
    conditions: Conditions | None = None  # filled by encode: what rows share outlives the rows that run
    prompt_tokens: int = 0  # filled by encode
    warnings: list[str] = field(default_factory=list)  # filled by encode


def resume(row: Row, state: RowState, device: torch.device) -> None:
    """Bring a prepared row to where another process left it."""
    arrays = {name: to_numpy(array).copy() for name, array in state.tensors.items()}
    row.restore({name: torch.from_numpy(values).to(device) for name, values in arrays.items()}, state.step)


def state_of(row: Row) -> RowState:
    """What `resume` needs."""
    tensors = {name: from_numpy(tensor.float().cpu().numpy()) for name, tensor in row.tensors().items()}
    return RowState(row.index, row.step, tensors)


def way_back(row: Row) -> Callable[[], None]:
    """What brings a row back to where it is now."""
    tensors, step, clean = row.tensors(), row.step, row.clean

    def go_back() -> None:
        row.restore(tensors, step)
        row.clean = clean

    return go_back


def preview_steps(steps: int, previews: int) -> list[int]:
    """After which steps a row shows itself: evenly spread, never after the last."""
    wanted = {(i + 1) * steps // (previews + 1) for i in range(previews)}
    return sorted(wanted - {0, steps})


def gauges_of(active: Iterable[Active], scheduler: Scheduler, cache: CacheUse, **step: Any) -> Gauges:
    """The engine's state after a step, with what is known of the step itself; nothing after a piece of decoding."""
    figures = {"step_seconds": 0.0, "step_rows": 0, "step_tokens": 0, **step}
    return Gauges(
        running_rows=scheduler.running_rows,
        waiting_rows=scheduler.waiting_rows,
        cache_bytes=cache.bytes,
        cache_hits=cache.hits,
        cache_misses=cache.misses,
        step_cache_bytes=sum(row.history.nbytes for each in active for row in each.rows.values()),
        **figures,
    )
