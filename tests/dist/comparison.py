"""Results of whole runs on several ranks beside those of one, for all families."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal_gen.weights.header import read_header
from multimodal_gen.weights.loading import WeightTree
from tests.support.adapters import Shapes, peft_tensors, write_adapter
from tests.support.zoo import zoo_tensors

TOLERANCE = 1e-4  # largest difference of a latent after all steps
KINDS = ("base", "zoo", "both", "beside", "mixed")


def matrices(file: Path, prefix: str, *without: str) -> dict[str, tuple[int, ...]]:
    """The linear layers of a checkpoint file: prefix + module → shape of its weight."""
    header = read_header(file, "")
    return {
        prefix + name.removesuffix(".weight"): info.shape
        for name, info in header.items()
        if len(info.shape) == 2 and not any(part in name for part in without)
    }


def vectors(file: Path, prefix: str, part: str) -> dict[str, tuple[int, ...]]:
    """The norms and the like whose names hold `part`: prefix + module → shape of its weight."""
    header = read_header(file, "")
    named = {name: info.shape for name, info in header.items() if part in name and name.endswith(".weight")}
    return {prefix + name.removesuffix(".weight"): shape for name, shape in named.items() if len(shape) == 1}


def write_adapters(folder: Path, shapes: Shapes, overflowing: str, norms: Shapes | None = None) -> dict[str, str]:
    """The files that `models.whole_runs` wants.

    Args:
        overflowing: a module whose inputs ranks share.
        norms: modules that are vectors; the file that can only be merged changes them too.
    """
    generator = torch.Generator().manual_seed(3)
    of_norms = {f"{name}.diff": torch.randn(n, generator=generator) * 0.1 for name, n in (norms or {}).items()}
    too_much = torch.zeros(shapes[overflowing])
    too_much[0, :2] = 3e38  # in the first rank's columns: no other one sees that the sum is infinite
    files: dict[str, dict[str, Tensor]] = {
        "zoo": zoo_tensors(shapes, prefix="", seed=1) | of_norms,
        "plain": peft_tensors(shapes, prefix="", seed=2, size=0.2),
        "too_much": {f"{overflowing}.diff": too_much},
    }
    return {name: str(write_adapter(folder / f"{name}.safetensors", tensors)) for name, tensors in files.items()}


def assert_same(results: Sequence[Mapping[str, Tensor]], alone: Mapping[str, Tensor]) -> None:
    """Within the tolerance of one process, and bit-equal among ranks."""
    for name, expected in alone.items():
        difference = float((results[0][name] - expected).abs().max())
        assert difference <= TOLERANCE, f"{name}: {difference:.2e}"
        for found in results[1:]:
            assert torch.equal(found[name], results[0][name]), f"{name}: ranks differ"


def assert_adapters_did_something(alone: Mapping[str, Tensor], rows: int) -> None:
    """Adapters that did nothing would pass any comparison with themselves."""
    for i in range(rows):
        found: list[Any] = [alone[f"{kind}-{i}/0"] for kind in KINDS]
        distances = {(a, b): float((found[a] - found[b]).abs().max()) for a in range(5) for b in range(a)}
        equal = {pair for pair, distance in distances.items() if distance <= 1e-2}
        assert equal == (set() if i % 2 else {(4, 0)}), distances  # mixed: every second row is the base model's


def assert_no_worse(found: Mapping[str, Tensor], one: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """Fewer bits on ranks are about as far from float32 as fewer bits on one."""
    for name, latents in one.items():
        error, usual = (float((x[name] - exact[name]).norm() / exact[name].norm()) for x in (found, one))
        assert usual > 1e-4, "one process computes in fewer bits too"
        assert error < 1.5 * usual, f"{name} {list(latents.shape)}: {error:.1e} on ranks, {usual:.1e} on one"


def bytes_of(weights: WeightTree, *parts: str) -> int:
    """Bytes of the weights whose names hold one of `parts`, as the checkpoint has them, in the model's dtype."""
    return sum(
        math.prod(weights.shapes[key]) * place.tensor.itemsize
        for key, place in weights.places.items()
        if any(part in key for part in parts)
    )
