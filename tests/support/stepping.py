"""An engine driven step by step in this process, with requests that arrive on the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from multimodal_gen.engine.core import EngineCore
from multimodal_gen.media.arrays import to_numpy
from multimodal_gen.messages import Event, Failed, Finished, Gauges
from multimodal_gen.request import AnyRequest


def run(core: EngineCore, arrivals: Sequence[tuple[int, AnyRequest]]) -> tuple[dict[str, np.ndarray], list[int]]:
    """Latents of every request, and how many rows each step had."""
    waiting = sorted(arrivals, key=lambda arrival: arrival[0])
    latents: dict[str, np.ndarray] = {}
    rows: list[int] = []
    clock = 0
    while waiting or not core.idle:
        while waiting and waiting[0][0] <= clock:
            core.add(waiting.pop(0)[1])
        for event in core.step():
            note(event, latents, rows)
        clock += 1
    return latents, rows


def note(event: Event, latents: dict[str, np.ndarray], rows: list[int]) -> None:
    """Keep what an event brings; a failed request is a failed test."""
    assert not isinstance(event, Failed), event
    if isinstance(event, Finished):
        latents[event.request_id] = np.stack([to_numpy(array) for array in event.outputs])
    elif isinstance(event, Gauges):
        rows.append(event.step_rows)
