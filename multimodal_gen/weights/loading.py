"""Safetensors shards, read one tensor at a time straight into the places where the model computes with them.

The model is constructed first, in its final dtype on the meta device, shared out among ranks where there are several,
and given memory; every checkpoint tensor, or the share of it that this rank holds, is then copied (and cast) from the
memory-mapped file into its slot. Peak memory is the model plus one tensor. The table of places stays: adapters find a
layer by its checkpoint name through it, and read the pristine weights again from the same files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from multimodal_gen.errors import CorruptModel
from multimodal_gen.nn.slots import Cut, Slotted
from multimodal_gen.weights.header import read_header


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


@dataclass(frozen=True)
class Place:
    """Where one checkpoint tensor lives in a model."""

    layer: nn.Module  # the module that holds it
    name: str  # its name there: "weight", "bias"
    part: str | None  # of a fused layer

    @property
    def cut(self) -> Cut | None:
        """Which piece of the checkpoint's tensor is held; None: all of it."""
        return self.layer.cuts.get(self.name) if isinstance(self.layer, Slotted) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor in the checkpoint."""
        share = tuple(self.view().shape)
        return share if self.cut is None else self.cut.whole(share)

    def view(self) -> Tensor:
        """The memory that the checkpoint's tensor, or the piece of it, fills, in the checkpoint's layout."""
        if isinstance(self.layer, Slotted) and self.name == "weight":
            return self.layer.slot(self.part)
        if isinstance(self.layer, Slotted) and self.name == "bias":
            return self.layer.bias_slot(self.part)
        own = dict(self.layer.named_parameters(recurse=False)) | dict(self.layer.named_buffers(recurse=False))
        return own[self.name].detach()


class WeightTree:
    """A model whose tensors are known by the names that its checkpoint files give them."""

    def __init__(
        self,
        model: nn.Module,
        files: Sequence[Path],
        renames: Sequence[Rename] = (),
        ignored: Sequence[str] = (),
    ) -> None:
        """`ignored` are patterns of checkpoint keys that the model has no use for. Raises: CorruptModel."""
        self.model = model
        self.files = tuple(files)
        self.shapes: dict[str, tuple[int, ...]] = {}  # every tensor of the files, those without use included
        self.places: dict[str, Place] = {}  # every tensor that the model has a place for
        self._file_of: dict[str, Path] = {}
        self._stamps = {file: _stamp(file) for file in self.files}
        self._names: dict[str, str] = {}  # checkpoint key → the model's own name
        layers, names = dict(model.named_modules()), set(model.state_dict())
        for file in self.files:
            for key, info in read_header(file, str(file)).items():
                if key in self.shapes:
                    raise CorruptModel(f"{file}: tensor {key!r} is doubled; {self._file_of[key].name} has it too.")
                self.shapes[key] = info.shape
                self._file_of[key] = file
                if any(re.fullmatch(pattern, key) for pattern in ignored):
                    continue
                name, part = next(filter(None, (row.apply(key) for row in renames)), (key, None))
                if name not in names:
                    raise CorruptModel(
                        f"{file}: tensor {key!r} has no place in {type(model).__name__}; is it another model's?"
                    )
                self._names[key] = name
                layer, _, own = name.rpartition(".")
                self.places[key] = Place(layers[layer], own, part)

    def load(self) -> None:
        """Fill every parameter of the model.

        Raises: CorruptModel naming the file and the tensor that is missing, doubled or of the wrong shape.
        """
        missing = {name: tensor.numel() for name, tensor in self.model.state_dict().items()}
        for name, layer in self.model.named_modules():
            if isinstance(layer, Slotted):
                missing[f"{name}.weight"] = sum(layer.slot(part).numel() for part in layer.part_names)
        for key, place in self.places.items():
            if place.shape != self.shapes[key]:
                raise CorruptModel(
                    f"{self._file_of[key]}: tensor {key!r} has shape {self.shapes[key]} and the model's "
                    f"configuration wants {place.shape}. The weights and config.json do not belong together."
                )
        for key, tensor in self.read(self.places):
            slot = self.places[key].view()
            slot.copy_(tensor)
            missing[self._names[key]] -= slot.numel()
        wrong = [name for name, count in missing.items() if count]
        if wrong:
            where = self.files[0].parent if self.files else "the checkpoint"
            raise CorruptModel(f"{where}: {len(wrong)} tensors are missing or doubled, for example {wrong[0]!r}.")

    @property
    def parameters(self) -> int:
        """Numbers in the checkpoint's tensors that the model uses, whichever rank holds them."""
        return sum(math.prod(self.shapes[key]) for key in self.places)

    def read(self, keys: Iterable[str], whole: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these keys as the files hold them, file by file; each is mapped only while it is in use.

        Args:
            whole: keys whose tensor is wanted whole where only a piece of it is held.

        Raises: CorruptModel naming the file, also for one that was changed since the model was loaded.
        """
        wanted: dict[Path, dict[str, tuple[slice, ...] | None]] = {}
        for key in keys:
            cut = self.places[key].cut if key in self.places and key not in whole else None
            wanted.setdefault(self._file_of[key], {})[key] = cut.index_of(self.shapes[key]) if cut else None
        for file, names in wanted.items():
            self._check(file)
            yield from _tensors(file, names)

    def check(self) -> None:
        """Raises: CorruptModel naming a file that was changed since the model was loaded."""
        for file in self.files:
            self._check(file)

    def _check(self, file: Path) -> None:
        if _stamp(file) != self._stamps[file]:
            raise CorruptModel(f"{file} was changed while the model was in use; restart with the right file.")


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


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give memory to what was constructed on the meta device; padding is zero, the rest is for the loader.

    What has memory, buffers that a model computed for itself, moves to `device`.
    """
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    for layer in model.modules():
        if isinstance(layer, Slotted) and layer.padded:
            for parameter in layer.parameters(recurse=False):
                parameter.zero_()


def load_weights(
    model: nn.Module, files: Sequence[Path], renames: Sequence[Rename] = (), ignored: Sequence[str] = ()
) -> WeightTree:
    """Fill every parameter of `model` from `files`. Raises as `WeightTree` and `WeightTree.load`."""
    tree = WeightTree(model, files, renames, ignored)
    tree.load()
    return tree


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise CorruptModel(f"{file} cannot be read: {error.strerror}.") from None
    return found.st_size, found.st_mtime_ns


def _tensors(file: Path, wanted: Mapping[str, tuple[slice, ...] | None]) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as reader:
            for key, piece in wanted.items():
                yield key, reader.get_tensor(key) if piece is None else reader.get_slice(key)[piece]
    except (SafetensorError, OSError) as error:
        raise CorruptModel(f"{file} cannot be read: {error}. Download it again.") from None
