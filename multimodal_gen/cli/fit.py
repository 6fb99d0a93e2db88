"""Whether a model fits, and how: the plan that loading it would make, here or on a GPU that is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.memory.describe import describe
from multimodal_gen.memory.estimate import Load, Rates, StepCost, moved_per_step, step_cost
from multimodal_gen.memory.gpus import Gpu, find_gpu
from multimodal_gen.memory.plan import MemoryPlan, Sizes, Wishes, plan_usual
from multimodal_gen.request import ModelCard
from multimodal_gen.weights.checkpoint import verify

if TYPE_CHECKING:
    import torch

    from multimodal_gen.memory.residency import Memory
    from multimodal_gen.parallel.degrees import Degrees


@dataclass(frozen=True)
class Place:
    """Where the model would run."""

    name: str  # as shown: "cpu", "cuda:0", "rtx-4090"
    kind: str  # "cpu" or "cuda"
    dtype: torch.dtype
    free: int  # bytes of the device, for one rank
    host: int  # bytes of the machine, where the device is another
    gpu: Gpu | None  # the row of the table, for a GPU that is named
    here: bool  # whether its speed can be measured


def place(config: EngineConfig, degrees: Degrees, gpu: str | None) -> Place:
    """This machine, or the GPU that was named. Raises: ConfigError."""
    from multimodal_gen.memory.free import free_bytes
    from multimodal_gen.nn.precision import DTYPES, resolve_device, resolve_dtype

    sharing = degrees.world * config.dp_size
    if gpu is None:
        device = resolve_device(config.device)
        on_cpu = device.type == "cpu"
        free = free_bytes(device, sharing if on_cpu else 1)
        host = 0 if on_cpu else free_bytes("cpu", sharing)
        return Place(str(device), device.type, resolve_dtype(config.dtype, device), free, host, None, True)
    if config.device == "cpu":
        raise ConfigError("--gpu plans for a GPU, and --device cpu for none; give one of them.", param="gpu")
    name, row, memory = find_gpu(gpu)
    dtype = DTYPES["bfloat16" if config.dtype == "auto" else config.dtype]
    return Place(name, "cuda", dtype, memory, free_bytes("cpu", sharing), row, False)


def fit(card: ModelCard, config: EngineConfig, gpu: str | None) -> dict[str, Any]:
    """The plan as plain data. Raises: ConfigError for what does not fit, CorruptModel."""
    from multimodal_gen.parallel.plan import plan as share_out

    degrees = share_out(config, card).degrees
    where = place(config, degrees, gpu)
    memory = _without_weights(card, config, degrees, where)
    sizes, wishes = memory.sizes(), Wishes.of(config)
    made, warning = plan_usual(sizes, wishes, memory.usual, memory.least, where.free, where.kind, where.host)
    files = [file for part in verify(Path(card.path)).components.values() for file in part.files]
    cost = _cost(made, sizes, card, where, files)
    return {
        "place": where.name,
        "ranks": degrees.world,
        "dtype": str(where.dtype).removeprefix("torch."),
        "free_bytes": where.free,
        "limit_bytes": made.limit_bytes,
        "peak_bytes": made.peak_bytes,
        "working_bytes": {"usual": dict(memory.usual), "least": dict(memory.least)},
        "warning": warning,
        "slots": made.slots,
        "slot_bytes": made.slot_bytes,
        "host_bytes": made.host_bytes,
        "pinned_bytes": made.pinned_bytes,
        "moved_bytes_per_step": moved_per_step(made, sizes),
        "slowdown": None if cost is None else round(cost.slowdown, 4),
        "components": [_component(part, made) for part in sizes],
        "lines": describe(made, sizes, where.kind, None if cost is None else cost.slowdown),
    }


def _without_weights(card: ModelCard, config: EngineConfig, degrees: Degrees, where: Place) -> Memory:
    """Of one rank: it knows its components' sizes and what their stages work with."""
    from multimodal_gen.memory.residency import without_weights
    from multimodal_gen.parallel.mesh import Mesh
    from multimodal_gen.pipelines import registry

    dtype = str(where.dtype).removeprefix("torch.")
    if not where.here:  # nothing computes: what the model looks like does not depend on the device
        config = msgspec.structs.replace(config, device="cpu", dtype=dtype, attention_backend="auto")
    mesh = Mesh.solo() if degrees.world == 1 else Mesh.imagined(degrees)
    with without_weights():
        return registry.load(card, config, mesh).memory


def _cost(
    made: MemoryPlan, sizes: Sequence[Sizes], card: ModelCard, where: Place, files: Sequence[Path]
) -> StepCost | None:
    """Of a step with the model's defaults, where layers stream and the speed is known."""
    if not made.slots:
        return None
    rates = _rates(where, files)
    return None if rates is None else step_cost(made, sizes, Load.of(card), rates, where.dtype.itemsize)


def _rates(where: Place, files: Sequence[Path]) -> Rates | None:
    if not where.here:
        return None if where.gpu is None else where.gpu.rates
    import torch

    from multimodal_gen.memory import measure

    return measure.rates(torch.device(where.name), where.dtype, files)


def _component(part: Sizes, made: MemoryPlan) -> dict[str, Any]:
    share = made.shares[part.name]
    return {
        "name": part.name,
        "stage": part.stage,
        "residency": share.residency,
        "bytes": part.total,
        "layers": len(part.layers),
        "layer_bytes": max(part.layers, default=0),
        "resident_layers": list(share.resident_layers),
        "held_bytes": share.held(part),
    }
