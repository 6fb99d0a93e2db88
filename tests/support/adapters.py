"""Adapter files with random weights, in the spelling of whoever is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]  # module → shape of its weight


def linear_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The linear layers of a model (diffusers' or transformers'): module → (out, in)."""
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def low_rank(shape: tuple[int, ...], rank: int, generator: torch.Generator, size: float = 0.3) -> tuple[Tensor, Tensor]:
    """A [r, in], B [out, r] whose product is about `size` times as large as a weight of standard deviation 1/√in."""
    out, width = shape
    down = torch.randn(rank, width, generator=generator) / width**0.5
    up = torch.randn(out, rank, generator=generator) * size / rank**0.5
    return down, up


def peft_tensors(
    shapes: Shapes, *, rank: int = 4, seed: int = 0, prefix: str = "transformer.", size: float = 0.3
) -> dict[str, Tensor]:
    """`<prefix><module>.lora_A.weight` and `lora_B`, as diffusers saves them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, shape in shapes.items():
        down, up = low_rank(shape, rank, generator, size)
        tensors[f"{prefix}{module}.lora_A.weight"] = down
        tensors[f"{prefix}{module}.lora_B.weight"] = up
    return tensors


def write_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """One safetensors file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def only(shapes: Shapes, *parts: str) -> dict[str, tuple[int, ...]]:
    """The modules whose name holds one of `parts`."""
    return {module: shape for module, shape in shapes.items() if any(part in module for part in parts)}


def without(shapes: Shapes, parts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The others."""
    return {module: shape for module, shape in shapes.items() if not any(part in module for part in parts)}


def make_adapter_for(folder: Path, path: Path) -> Path:
    """An adapter for the attention of the transformer in a model's folder, in diffusers' spelling."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in (folder / "transformer").glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if name.endswith((".to_q.weight", ".to_v.weight"))]  # noqa: SIM118
            shapes |= {name.removesuffix(".weight"): tuple(weights.get_slice(name).get_shape()) for name in names}
    return write_adapter(path, peft_tensors(shapes, size=1.0))
