"""What becomes of a family's layers: compiled (--compile), recorded (--cuda-graphs; small work on a CPU always)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import nn

from multimodal_gen.attention.apart import ApartAttention
from multimodal_gen.attention.base import AttentionBackend
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.kernels import native
from multimodal_gen.memory.residency import Memory
from multimodal_gen.nn import compiled
from multimodal_gen.nn.cpu_graphs import CpuRecorder
from multimodal_gen.nn.graphs import CudaTape, Graphs, Recorder, TapeRecorder
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
        self._alone = True  # no other rank computes with this one; filled by attention
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
        self._alone = mesh.degrees.world == 1
        backend = choose_attention(name, self._device, mesh)
        if not (self._config.compile or self._config.cuda_graphs):
            return backend
        return ApartAttention(backend, recorded=mesh.sp.size == 1)

    def apply(
        self, models: Mapping[str, Recorded], layers: Iterable[nn.Module], memory: Memory, *, by_shape: bool
    ) -> None:
        """Once weights are loaded.

        Args:
            models: by the name of their component.
            by_shape: whether regions depend on nothing of a request but its shapes: then what is recorded of one serves
                others, and holds nothing of it.

        Raises: ConfigError.
        """
        if self._config.compile:
            compiled.compile_layers(layers)
        if self._config.cuda_graphs:
            for name in models:
                _check_resident(name, memory)
            self._record(models.values(), TapeRecorder(CudaTape(self._device)))
        elif by_shape and self._replays():
            self._record([model for name, model in models.items() if memory.stays(name)], CpuRecorder())

    def _replays(self) -> bool:
        """Whether calls of our own kernels can be all there is, on this device and with these settings."""
        alone = self._device.type == "cpu" and self._alone and not self._config.compile
        return alone and not native.switched_off() and not native.unavailable()

    def _record(self, models: Iterable[Recorded], recorder: Recorder) -> None:
        for model in models:
            model.graphs = Graphs(recorder)
            self._graphs.append(model.graphs)

    def clear(self) -> None:
        """Weights are elsewhere, or in another form, from now on."""
        for graphs in self._graphs:
            graphs.clear()


def _check_resident(name: str, memory: Memory) -> None:
    if memory.plan is not None and not memory.stays(name):
        share = memory.plan.shares[name]
        raise ConfigError(
            f"--cuda-graphs needs {name} to stay on the device, and it is {share.residency} "
            "(docs/memory.md). Leave one of them out: --cuda-graphs, or what makes weights move.",
            param="cuda_graphs",
        )
