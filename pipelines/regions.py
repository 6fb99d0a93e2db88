"""--compile and --cuda-graphs: what becomes of a family's layers, and where it cannot be had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import nn

from multimodal_gen.attention.apart import ApartAttention
from multimodal_gen.attention.base import AttentionBackend
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.memory.residency import Memory
from multimodal_gen.nn import compiled
from multimodal_gen.nn.graphs import CudaTape, Graphs
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.parallel.sequence import choose_attention


class Recorded(Protocol):
    """A model whose layers run in graphs where there are any."""

    graphs: Graphs | None


class Regions:
    """The settings of one pipeline."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        """Raises: ConfigError."""
        self._config, self._device = config, device
        self._graphs: list[Graphs] = []
        if config.compile:
            compiled.check(device)
        if config.cuda_graphs and device.type != "cuda":
            raise ConfigError(
                f"--cuda-graphs records work of a CUDA device, and the model runs on {device}. Leave it out.",
                param="cuda_graphs",
            )

    def attention(self, name: str, mesh: Mesh) -> AttentionBackend:
        """The backend of that name; compiled layers call it from outside, recorded ones where ranks talk.

        Raises: ConfigError.
        """
        backend = choose_attention(name, self._device, mesh)
        if not (self._config.compile or self._config.cuda_graphs):
            return backend
        return ApartAttention(backend, recorded=mesh.sp.size == 1)

    def apply(self, models: Mapping[str, Recorded], layers: Iterable[nn.Module], memory: Memory) -> None:
        """Once weights are loaded. `models`: by the name of their component. Raises: ConfigError."""
        if self._config.compile:
            compiled.compile_layers(layers)
        if self._config.cuda_graphs:
            for name in models:
                _check_resident(name, memory)
            self._record(models, CudaTape(self._device))

    def _record(self, models: Mapping[str, Recorded], tape: CudaTape) -> None:
        for model in models.values():
            model.graphs = Graphs(tape)
            self._graphs.append(model.graphs)

    def clear(self) -> None:
        """Weights are elsewhere, or in another form, from now on."""
        for graphs in self._graphs:
            graphs.clear()


def _check_resident(name: str, memory: Memory) -> None:
    share = None if memory.plan is None else memory.plan.shares[name]
    if share is not None and share.residency != "resident":
        raise ConfigError(
            f"--cuda-graphs needs {name} to stay on the device, and it is {share.residency} "
            "(docs/memory.md). Leave one of them out: --cuda-graphs, or what makes weights move.",
            param="cuda_graphs",
        )
