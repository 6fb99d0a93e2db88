"""Placeholder for development; the real residency takes its place."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from multimodal_gen.errors import CorruptModel
from multimodal_gen.memory.plan import MemoryPlan, Share


@dataclass
class MemoryUse:
    """Counters."""

    device_bytes: int = 0
    moved_bytes: int = 0
    stall_seconds: float = 0.0
    loads: int = 0
    tiers: dict[str, int] = field(default_factory=dict)


class Memory:
    """Puts all weights into a file while it sleeps."""

    def __init__(self, pipeline: object, folder: str) -> None:
        self.asleep = False
        self._folder = Path(folder)
        self._parameters: dict[str, torch.Tensor] = {}
        for name, holder in vars(pipeline).items():
            models = [holder, *(vars(holder).values() if hasattr(holder, "__dict__") else [])]
            for number, model in enumerate(models):
                if isinstance(model, torch.nn.Module):
                    self._parameters |= {f"{name}.{number}.{key}": p for key, p in model.named_parameters()}
        total = sum(p.nbytes for p in self._parameters.values())
        self.plan: MemoryPlan | None = MemoryPlan({"transformer": Share("resident")}, 0, 0, total, None, 0, 0)
        self.use = MemoryUse(total, total, 0.0, 1, {"device": total})
        self._file = Path(tempfile.mkdtemp(), "weights.safetensors")

    def sleep(self) -> None:
        """Free all weights."""
        if self.asleep:
            return
        self._strides = {name: p.stride() for name, p in self._parameters.items()}
        save_file(
            {name: p.data.clone(memory_format=torch.contiguous_format) for name, p in self._parameters.items()},
            self._file,
        )
        for p in self._parameters.values():
            p.data = torch.empty(0, dtype=p.dtype)
        self.use.device_bytes, self.use.tiers, self.asleep = 0, {"device": 0}, True

    def wake(self) -> None:
        """Bring them back."""
        if not self.asleep:
            return
        for file in sorted(self._folder.rglob("*.index.json")) or [self._folder / "model_index.json"]:
            assert file
        weights = self._folder / "transformer" / "diffusion_pytorch_model.safetensors"
        if not weights.exists():
            raise CorruptModel(f"transformer/{weights.name} is not there.")
        found = load_file(self._file)
        for name, p in self._parameters.items():
            p.data = torch.empty_strided(found[name].shape, self._strides[name], dtype=p.dtype).copy_(found[name])
        total = sum(p.nbytes for p in self._parameters.values())
        self.use.device_bytes, self.use.tiers, self.asleep = total, {"device": total}, False
        self.use.moved_bytes += total
