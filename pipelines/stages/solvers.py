"""The solvers of flow-matching models by the scheduler class that a checkpoint names: one visible table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from multimodal_gen.errors import CorruptModel
from multimodal_gen.pipelines.contract import Row, Sampler
from multimodal_gen.pipelines.stages import flow_match, unipc
from multimodal_gen.weights.checkpoint import read_json


class State(Protocol):
    """One row's schedule and what its solver has gathered; immutable but for `restore`."""

    sigmas: Tensor  # float32 [steps + 1] on the CPU, from 1 (noise) to 0 (clean)
    timesteps: Tensor  # [steps] on the CPU, 1000 noise … 0 clean

    def advance(self, x: Tensor, velocity: Tensor, step: int) -> tuple[Tensor, Sampler]:
        """Latents after `step`, float32, and the state then, from latents before it and the velocity dx/dσ there."""


class Solver(Protocol):
    """Makes per-row states."""

    def start(self, steps: int, shift: float | None) -> Sampler:
        """The schedule of a row; `shift` replaces the checkpoint's."""


SOLVERS: dict[str, Callable[[Mapping[str, Any]], Solver]] = {
    unipc.SCHEDULER_CLASS: unipc.UniPC,
    flow_match.SCHEDULER_CLASS: flow_match.FlowMatchEuler,
}


def state_of(row: Row) -> State:
    """The state of a row that has been prepared."""
    assert row.sampler is not None, "prepare() comes before denoise()"
    state: State = row.sampler  # type: ignore[assignment]  # every solver of the table makes one
    return state


def load_solver(folder: Path) -> Solver:
    """The solver of a scheduler/ folder. Raises: CorruptModel for one that is not in the table."""
    config = read_json(folder, "scheduler_config.json")
    name = config.get("_class_name")
    if name not in SOLVERS:
        raise CorruptModel(f"scheduler_config.json asks for {name}; this family is built for {' and '.join(SOLVERS)}.")
    return SOLVERS[name](config)
