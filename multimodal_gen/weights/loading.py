"""Safetensors shards, read one tensor at a time straight into the places where the model computes with them.

The model is constructed first, in its final dtype and on its final device; every checkpoint tensor is then copied (and
cast) from the memory-mapped file into its slot. Peak memory is the model plus one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from multimodal_gen.errors import CorruptModel
from multimodal_gen.nn.slots import Slotted


@dataclass(frozen=True)
class Rename:
    """One row of a family's table: checkpoint keys that match `pattern` fill `target`, or its part `part`.

    `target` and `part` are templates of the match, as in `re.Match.expand`. The first matching row counts; keys
    without a row keep their names.
    """

    pattern: str
    target: str
    part: str | None = None

    def apply(self, key: str) -> tuple[str, str | None] | None:
        """(parameter name, part) for a checkpoint key, or None."""
        match = re.fullmatch(self.pattern, key)
        if match is None:
            return None
        return match.expand(self.target), None if self.part is None else match.expand(self.part)


@contextmanager
def construction(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside are allocated on `device` with floating parameters of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def load_weights(
    model: nn.Module, files: Sequence[Path], renames: Sequence[Rename] = (), ignored: Sequence[str] = ()
) -> None:
    """Fill every parameter of `model` from `files`.

    `ignored` are patterns of checkpoint keys that the model has no use for.
    Raises: CorruptModel naming the file and the tensor that is missing, left over, doubled or of the wrong shape.
    """
    tensors = dict(model.state_dict())
    missing = {name: tensor.numel() for name, tensor in tensors.items()}
    slots = {f"{name}.weight": module.slot for name, module in model.named_modules() if isinstance(module, Slotted)}
    for name, module in model.named_modules():
        if isinstance(module, Slotted):
            missing[f"{name}.weight"] = sum(module.slot(part).numel() for part in module.part_names)
    for file in files:
        for key, tensor in _tensors(file):
            if any(re.fullmatch(pattern, key) for pattern in ignored):
                continue
            name, part = next(filter(None, (row.apply(key) for row in renames)), (key, None))
            if name not in tensors:
                raise CorruptModel(
                    f"{file}: tensor {key!r} has no place in {type(model).__name__}; is it another model's?"
                )
            slot = slots[name](part) if name in slots else tensors[name]
            if slot.shape != tensor.shape:
                raise CorruptModel(
                    f"{file}: tensor {key!r} has shape {tuple(tensor.shape)} and the model's configuration wants "
                    f"{tuple(slot.shape)}. The weights and config.json do not belong together."
                )
            slot.copy_(tensor)
            missing[name] -= slot.numel()
    wrong = [name for name, count in missing.items() if count]
    if wrong:
        where = files[0].parent if files else "the checkpoint"
        raise CorruptModel(f"{where}: {len(wrong)} tensors are missing or doubled, for example {wrong[0]!r}.")


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as reader:
            for key in reader.keys():  # noqa: SIM118 (not a mapping)
                yield key, reader.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CorruptModel(f"{file} cannot be read: {error}. Download it again.") from None
