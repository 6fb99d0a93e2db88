"""An adapter file with one update of every kind on layers of every kind of sharing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.support.adapters import Shapes, low_rank

KINDS = ("lora", "dora", "loha", "lokr", "diff")


def zoo_tensors(shapes: Shapes, *, prefix: str, seed: int = 0, rank: int = 3) -> dict[str, Tensor]:
    """Kinds take turns over the modules in the order given."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for number, (module, shape) in enumerate(shapes.items()):
        made = _make(KINDS[number % len(KINDS)], shape, rank, generator)
        tensors.update({f"{prefix}{module}.{ending}": tensor for ending, tensor in made.items()})
    return tensors


def _make(kind: str, shape: tuple[int, ...], rank: int, generator: torch.Generator) -> Mapping[str, Tensor]:
    out, width = shape
    down, up = low_rank(shape, rank, generator)
    if kind == "lora":
        return {"lora_A.weight": down, "lora_B.weight": up}
    if kind == "dora":
        magnitude = 0.5 + torch.rand(out, generator=generator)
        return {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitude}
    if kind == "loha":
        other_down, other_up = low_rank(shape, rank, generator)
        size = 3.0  # of products of two small numbers
        return {"hada_w1_a": up * size, "hada_w1_b": down, "hada_w2_a": other_up * size, "hada_w2_b": other_down}
    if kind == "lokr":
        outer = 3  # divides widths that are shared out by 2 and 4, and straddles their borders
        while out % outer or width % outer:
            outer -= 1
        inner_down, inner_up = low_rank((out // outer, width // outer), rank, generator)
        return {
            "lokr_w1": torch.randn(outer, outer, generator=generator),
            "lokr_w2_a": inner_up,
            "lokr_w2_b": inner_down,
        }
    return {"diff": torch.randn(shape, generator=generator) * 0.3 / width**0.5}
