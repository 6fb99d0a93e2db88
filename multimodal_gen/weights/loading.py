"""Tensors of checkpoint files, read one at a time straight into the places where the model computes with them.

The model is constructed first, in its final dtype on the meta device, shared out among ranks where there are several,
and given memory; every checkpoint tensor, or the share of it that this rank holds, is then read (and cast) from the
file into its slot. Peak memory is the model plus one block. The table of places stays: adapters find a layer by its
checkpoint name through it and say how its weight is changed on the way in (`Recipe`), and weights that do not stay in
memory are read again from the same files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from multimodal_gen.errors import CorruptModel
from multimodal_gen.nn.forms import Form, Formed, filled
from multimodal_gen.nn.slots import Cut, Slotted
from multimodal_gen.weights.reader import TensorFile


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
        return self.layer.cut(self.name, self.part) if isinstance(self.layer, Slotted) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor in the checkpoint."""
        share = tuple(self.view().shape)
        return share if self.cut is None else self.cut.whole(share)

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer that holds it, maybe with others."""
        own = dict(self.layer.named_parameters(recurse=False)) | dict(self.layer.named_buffers(recurse=False))
        return own[self.name]

    def view(self) -> Tensor:
        """The memory that the checkpoint's tensor, or the piece of it, fills, in the checkpoint's layout."""
        if isinstance(self.layer, Slotted) and self.name == "weight":
            return self.layer.slot(self.part)
        if isinstance(self.layer, Slotted) and self.name == "bias":
            return self.layer.bias_slot(self.part)
        return self.tensor.detach()


Change = Callable[
    [slice, Tensor], Tensor
]  # which rows of the tensor held here, those rows as the file has them → changed


class Recipe(Protocol):
    """How a tensor is changed on its way from the file into the model; immutable."""

    @property
    def whole(self) -> bool:
        """Whether it reads whole rows where only some columns of them are held."""

    def begin(self, device: torch.device, dtype: torch.dtype) -> Change:
        """What makes rows of the model's tensor, on a device and in a dtype."""


class WeightTree:
    """A model whose tensors are known by the names that its checkpoint files give them."""

    def __init__(
        self,
        model: nn.Module,
        files: Sequence[Path | TensorFile],
        renames: Sequence[Rename] = (),
        ignored: Sequence[str] = (),
    ) -> None:
        """`ignored` are patterns of checkpoint keys that the model has no use for. Raises: CorruptModel."""
        self.model = model
        opened = [file if isinstance(file, TensorFile) else TensorFile(file) for file in files]
        self.files = {file.path: file for file in opened}
        self.shapes: dict[str, tuple[int, ...]] = {}  # every tensor of the files, those without use included
        self.places: dict[str, Place] = {}  # every tensor that the model has a place for
        self.recipes: Mapping[str, Recipe] = {}  # of the tensors that are changed; filled by `alter`
        self.absent: frozenset[str] = frozenset()  # keys whose place has no memory of its own now; filled by residency
        self.uncached: frozenset[str] = frozenset()  # keys that are read around the page cache; filled by residency
        self.on_alter: Callable[[Set[str]], None] = lambda keys: None  # told of keys whose recipe is another
        self.exact = True  # whether weights are computed with in all bits of their dtype; filled by residency
        self.forms: Mapping[Formed, Form] = {}  # of layers that hold their weight in another form; filled by residency
        self.losses: dict[Formed, float] = {}  # what those in fewer bits lose, as `forms.loss`; filled by fill
        self._file_of: dict[str, TensorFile] = {}
        self._names: dict[str, str] = {}  # checkpoint key → the model's own name
        layers, names = dict(model.named_modules()), set(model.state_dict())
        for path, file in self.files.items():
            for key, info in file.tensors.items():
                if key in self.shapes:
                    raise CorruptModel(f"{path}: tensor {key!r} is doubled; {self._file_of[key].path.name} has it too.")
                self.shapes[key] = info.shape
                self._file_of[key] = file
                if any(re.fullmatch(pattern, key) for pattern in ignored):
                    continue
                name, part = next(filter(None, (row.apply(key) for row in renames)), (key, None))
                if name not in names:
                    raise CorruptModel(
                        f"{path}: tensor {key!r} has no place in {type(model).__name__}; is it another model's?"
                    )
                self._names[key] = name
                layer, _, own = name.rpartition(".")
                self.places[key] = Place(layers[layer], own, part)

    @property
    def parameters(self) -> int:
        """Numbers in the checkpoint's tensors that the model uses, whichever rank holds them."""
        return sum(math.prod(self.shapes[key]) for key in self.places)

    def stored_bytes(self) -> dict[str, int]:
        """Key → bytes in its file, of what the model has a place for, in the order of the files."""
        found = ((key, info) for file in self.files.values() for key, info in file.tensors.items())
        return {key: info.end - info.begin for key, info in found if key in self.places}

    def verify(self) -> None:
        """Check that the files fill every parameter, whether it has memory or not.

        Raises: CorruptModel naming the file and the tensor that is missing, doubled or of the wrong shape.
        """
        missing = {name: tensor.numel() for name, tensor in self.model.state_dict().items()}
        for name, layer in self.model.named_modules():
            if isinstance(layer, Slotted):
                missing[f"{name}.weight"] = sum(layer.slot(part).numel() for part in layer.part_names)
        for key, place in self.places.items():
            if place.shape != self.shapes[key]:
                raise CorruptModel(
                    f"{self._file_of[key].path}: tensor {key!r} has shape {self.shapes[key]} and the model's "
                    f"configuration wants {place.shape}. The weights and config.json do not belong together."
                )
            missing[self._names[key]] -= place.view().numel()
        wrong = [name for name, count in missing.items() if count]
        if wrong:
            where = next(iter(self.files)).parent if self.files else "the checkpoint"
            raise CorruptModel(f"{where}: {len(wrong)} tensors are missing or doubled, for example {wrong[0]!r}.")

    def alter(self, recipes: Mapping[str, Recipe], keys: Set[str]) -> None:
        """From now on fill these keys by `recipes`, those without one as the files hold them."""
        kept = {key: recipe for key, recipe in self.recipes.items() if key not in keys}
        self.recipes = {**kept, **{key: recipes[key] for key in keys if key in recipes}}
        self.on_alter(keys)

    def fill(
        self,
        keys: Iterable[str],
        on_key: Callable[[], None] = lambda: None,
        into: Callable[[Tensor], Tensor] = lambda view: view,
    ) -> None:
        """Read these tensors, or this rank's share of them, into their places, in the order of the files.

        A layer that holds its weight in another form is made anew from all of its tensors.

        Args:
            on_key: called after each.
            into: what is written instead of a place; same shape and dtype.

        Raises: CorruptModel naming the file, also for one that was changed since the model was loaded; what a recipe
        raised.
        """
        wanted = set(keys)
        formed = self._formed(wanted)
        for key in self._in_order(wanted.difference(*formed.values())):
            self._fill(self._file_of[key], key, into(self.places[key].view()))
            on_key()
        for layer, own in formed.items():
            with filled(layer, self.forms[layer], self.losses):
                for key in self._in_order(own):
                    self._fill(self._file_of[key], key, self.places[key].view())
                    on_key()

    def _formed(self, keys: Set[str]) -> dict[Formed, set[str]]:
        """Layers of these keys that hold their weight in another form → all keys of that weight."""
        found: dict[Formed, set[str]] = {}
        touched = {self.places[key].layer for key in keys if self.places[key].name == "weight"}
        for key in self.places if self.forms else ():
            place = self.places[key]
            layer = place.layer if place.name == "weight" and place.layer in touched else None
            if isinstance(layer, Formed) and layer in self.forms:
                found.setdefault(layer, set()).add(key)
        return found

    def _in_order(self, keys: Set[str]) -> Iterator[str]:
        return (key for file in self.files.values() for key in file.tensors if key in keys)

    def _fill(self, file: TensorFile, key: str, view: Tensor) -> None:
        cut, recipe, direct = self.places[key].cut, self.recipes.get(key), key in self.uncached
        view = view[None] if view.dim() == 0 else view
        rows = cut.piece(self.shapes[key][0]) if cut is not None and cut.dim == 0 else None
        columns = cut.index_of(self.shapes[key]) if cut is not None and cut.dim > 0 else None
        as_stored = recipe is None and columns is None and not direct and file.same_dtype(key, view.dtype)
        if as_stored and view.device.type == "cpu" and view.is_contiguous():
            file.read_into(key, rows, view)
            return
        whole = recipe is not None and recipe.whole
        change = _unchanged if recipe is None else recipe.begin(view.device, view.dtype)
        for at, block in file.blocks(key, rows, direct=direct):
            view[at].copy_(change(at, block if columns is None or whole else block[(slice(None), *columns[1:])]))

    def try_out(self, keys: Iterable[str]) -> None:
        """Make these tensors by their recipes and throw them away. Raises: as `fill`."""
        for key in keys:
            place = self.places[key]
            held = self.shapes[key] if place.cut is None else place.cut.share(self.shapes[key])
            self._fill(self._file_of[key], key, torch.empty(held, dtype=place.tensor.dtype))

    def rows(self, key: str, indices: Sequence[int]) -> Tensor:
        """Some rows of a tensor, in the order asked for, as `fill` would write them. Raises: as `fill`."""
        place, file, recipe = self.places[key], self._file_of[key], self.recipes.get(key)
        assert place.cut is None, f"{key}: ranks that share a tensor hold its rows"
        found = torch.empty(len(indices), *self.shapes[key][1:], dtype=place.tensor.dtype)
        change = _unchanged if recipe is None else recipe.begin(found.device, found.dtype)
        # A product of fewer rows may be rounded in another way: what is changed is changed in the blocks of `fill`.
        step = 1 if recipe is None else file.rows_of_a_block(key)
        starts = sorted({index // step * step for index in indices})
        for start in starts:
            wanted = [(position, index) for position, index in enumerate(indices) if start <= index < start + step]
            at = slice(start, min(start + step, self.shapes[key][0]))
            for _, block in file.blocks(key, at):
                changed = change(at, block)
                for position, index in wanted:
                    found[position].copy_(changed[index - start])
        return found

    def read(self, keys: Iterable[str], whole: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these keys as the files hold them, file by file.

        Args:
            whole: keys whose tensor is wanted whole where only a piece of it is held.

        Raises: CorruptModel naming the file, also for one that was changed since the model was loaded.
        """
        for key in sorted(keys, key=lambda key: str(self._file_of[key].path)):
            cut = self.places[key].cut if key in self.places and key not in whole else None
            tensor = self._file_of[key].tensor(key)
            yield key, tensor if cut is None else tensor[cut.index_of(self.shapes[key])]

    def check(self) -> None:
        """Raises: CorruptModel naming a file that was changed since the model was loaded."""
        for file in self.files.values():
            file.check()


def _unchanged(_rows: slice, pristine: Tensor) -> Tensor:
    return pristine


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


def allocate(model: nn.Module, device: torch.device, formed: Iterable[Formed] = ()) -> None:
    """Give memory to what was constructed on the meta device; padding is zero, the rest is for the loader.

    What has memory, buffers that a model computed for itself, moves to `device`. The weights of `formed` layers get
    theirs each time they are filled.
    """
    bare = set(formed)
    for layer in bare:
        weight = _memory_like(layer.weight, device)
        weight.untyped_storage().resize_(0)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    model._apply(lambda x: _memory_like(x, device) if x.is_meta else x.to(device))
    clear_padding(model, bare)


def _memory_like(x: Tensor, device: torch.device) -> Tensor:
    """As empty_like, which of a tensor without memory imports sympy, a sixth of a small model's start."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def clear_padding(model: nn.Module, without: Container[nn.Module] = ()) -> None:
    """Zero what no checkpoint tensor fills, but in some layers."""
    for layer in model.modules():
        if isinstance(layer, Slotted) and layer not in without:
            for view in layer.padding():
                view.zero_()
