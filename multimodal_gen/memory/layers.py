"""The layers of a model that can be streamed, and the memory that they share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from multimodal_gen.nn.forms import Form, Formed, formed_bytes
from multimodal_gen.nn.slots import Slotted
from multimodal_gen.weights.loading import WeightTree

ALIGN = 64  # bytes between the tensors of a layer: a cache line, and what kernels ask for


@dataclass(frozen=True)
class LayerList:
    """A module list of a model; one row of a family's table."""

    path: str  # "layers", "encoder.block"
    apart: tuple[
        str, ...
    ] = ()  # patterns of a layer's parameters that are used outside its forward, and stay in memory


@dataclass(frozen=True)
class Track:
    """Lists that one pass runs from beginning to end, in this order."""

    name: str
    lists: tuple[LayerList, ...]


@dataclass(frozen=True)
class Spot:
    """Where a parameter of a layer stands in its slot."""

    owner: nn.Module
    name: str
    begin: int  # byte
    like: Tensor  # on the meta device: shape and dtype

    def put(self, slot: Tensor) -> None:
        """From now on the parameter is this part of `slot` (uint8, contiguous)."""
        view = slot[self.begin : self.begin + self.like.nbytes].view(self.like.dtype).view(self.like.shape)
        setattr(self.owner, self.name, nn.Parameter(view, requires_grad=False))


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer whose parameters move together."""

    number: int  # among all layers of the pipeline
    module: nn.Module
    weights: WeightTree
    spots: tuple[Spot, ...]
    keys: tuple[str, ...]  # of the checkpoint's tensors that fill them
    nbytes: int  # of a slot
    padded: tuple[Slotted, ...] = field(default=())  # its layers that hold more than the checkpoint fills

    def put(self, slot: Tensor) -> None:
        """Its parameters live in `slot` from now on."""
        for spot in self.spots:
            spot.put(slot)

    def passing(self, forms: Mapping[Formed, Form]) -> dict[Formed, Form]:
        """Those of `forms` that its weights take in every pass."""
        return {layer: form for layer, form in self._own(forms).items() if form.passing}

    def bytes_in(self, forms: Mapping[Formed, Form]) -> int:
        """What it takes where it stays, its weights in these forms."""
        own = self._own(forms)
        return self.nbytes - sum(layer.weight.nbytes for layer in own) + formed_bytes(own)

    def _own(self, forms: Mapping[Formed, Form]) -> dict[Formed, Form]:
        owners = [spot.owner for spot in self.spots if spot.name == "weight"]
        return {owner: forms[owner] for owner in owners if isinstance(owner, Formed) and owner in forms}

    def clear_padding(self, image: Tensor | None = None) -> None:
        """What the checkpoint does not fill is zero again, after another layer used the slot, or `image`."""
        for layer in self.padded:
            for view in layer.padding():
                (view if image is None else _same_part(image, view)).zero_()

    def fill(self, image: Tensor, keys: Sequence[str]) -> None:
        """Read some of its tensors into `image` (uint8 [nbytes]), which is laid out like its slot.

        Raises: as `WeightTree.fill`.
        """
        self.weights.fill(keys, into=partial(_same_part, image))


def _same_part(image: Tensor, view: Tensor) -> Tensor:
    """The part of `image` that a view of the slot's parameters is of the slot."""
    return image.view(view.dtype).as_strided(view.shape, view.stride(), view.storage_offset())


def find_layers(model: nn.Module, weights: WeightTree, lists: Sequence[LayerList], first: int) -> list[Layer]:
    """The layers of these lists, numbered from `first` on; the model is on the meta device."""
    keys: dict[tuple[nn.Module, str], list[str]] = {}
    for key, place in weights.places.items():
        keys.setdefault((place.layer, place.name), []).append(key)
    members = [(module, row) for row in lists for module in _members(model, row.path)]
    return [_layer(first + i, module, row, weights, keys) for i, (module, row) in enumerate(members)]


def _members(model: nn.Module, path: str) -> Iterator[nn.Module]:
    found = model.get_submodule(path)
    assert isinstance(found, nn.ModuleList), f"{path} of {type(model).__name__} is no list of layers"
    return iter(found)


def _layer(
    number: int, module: nn.Module, row: LayerList, weights: WeightTree, keys: dict[tuple[nn.Module, str], list[str]]
) -> Layer:
    spots, filled, end = [], list[str](), 0
    for name, parameter in module.named_parameters():
        if any(re.fullmatch(pattern, name) for pattern in row.apart):
            continue
        assert parameter.is_meta, f"{row.path}: layers are told from the rest before they have memory"
        path, _, own = name.rpartition(".")
        owner = module.get_submodule(path)
        spots.append(Spot(owner, own, end, parameter.detach()))
        filled += keys[owner, own]
        end += -(-parameter.nbytes // ALIGN) * ALIGN
    owners = {spot.owner for spot in spots if spot.name == "weight"}
    padded = tuple(owner for owner in owners if isinstance(owner, Slotted) and owner.padding())
    return Layer(number, module, weights, tuple(spots), tuple(filled), end, padded)


def make_slots(layers: Sequence[Layer], count: int, device: torch.device) -> list[Tensor]:
    """`count` slots, each large enough for the largest of the layers."""
    size = max((layer.nbytes for layer in layers), default=0)
    return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
