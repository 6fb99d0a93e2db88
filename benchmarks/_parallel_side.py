"""A rank of benchmarks/parallel.py: one denoising step, and what this rank sent for it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.pipelines.contract import Row
from tests.dist.models import Model


def measure(mesh: Mesh, folder: str, request: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Bytes by operation as the groups count them, and all that the process wrote to its sockets meanwhile."""
    model = Model.load(mesh, folder)
    row = Row(model.request("bench", **request), 0)
    model.pipeline.encode([row])
    model.pipeline.prepare(row)
    model.pipeline.denoise([row])  # text keys and modulations are made in the first step and kept
    groups = [group for name, group in mesh.groups.items() if name != "control"]
    mesh.control.barrier()
    before, written = _sent(groups), _written()
    model.pipeline.denoise([row])
    after = _sent(groups)
    mesh.control.barrier()  # the last bytes may leave after the operation that sent them returned
    on_the_wire = _written() - written
    counted = {name: torch.tensor(count - before[name]) for name, count in after.items()}
    return {**counted, "on_the_wire": torch.tensor(on_the_wire)}


def _sent(groups: list[Any]) -> Counter[str]:
    return sum((group.sent for group in groups), Counter())


def _written() -> int:
    """Bytes that this process handed to write(2) and its kin, sockets included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("wchar")))
