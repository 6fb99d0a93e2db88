"""One model of a pipeline, as memory sees it: what it consists of, and how it leaves the device and comes back."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from torch import Tensor, nn

from multimodal_gen.memory.layers import Layer
from multimodal_gen.memory.shares import DENOISE, Share, Sizes
from multimodal_gen.nn.forms import Form, Formed, formed_bytes
from multimodal_gen.weights.loading import WeightTree, clear_padding

RESIDENT = Share("resident")


@dataclass(eq=False)
class Component:
    """Filled by `Memory.add`; what the plan says of it by `Memory.load`."""

    name: str
    stage: str
    model: nn.Module
    weights: WeightTree
    tracks: dict[str, list[Layer]]  # every layer that could be streamed, in the order of use
    tables: dict[str, str]  # path of an embedding that could stay in its file → its checkpoint key
    forms: dict[Formed, Form]  # of the layers whose weight is computed with in another form than the one it is read in
    share: Share = RESIDENT
    streamed: frozenset[str] = frozenset()  # checkpoint keys of layers that pass through slots, and of tables
    present: bool = False  # whether what is not streamed is on the device
    _own: list[Tensor] = field(default_factory=list)  # filled by `settle`

    @property
    def parked(self) -> bool:
        """Whether it is on the device for its stage only."""
        return self.share.residency == "parked"

    @property
    def layers(self) -> list[Layer]:
        """Of all tracks."""
        return [layer for layers in self.tracks.values() for layer in layers]

    @property
    def every_step(self) -> list[Layer]:
        """Those that every step needs: of several tracks, the last."""
        return list(self.tracks.values())[-1] if self.stage == DENOISE and self.tracks else []

    @property
    def sizes(self) -> Sizes:
        """For the plan, before anything has memory."""
        moving = sum(spot.like.nbytes for layer in self.layers for spot in layer.spots)
        own = sum(tensor.nbytes for tensor in self._tensors())
        tables = sum(self.weights.places[key].tensor.nbytes for key in self.tables.values())
        layers = tuple(layer.nbytes for layer in self.layers)
        once = sum(len(track) for track in list(self.tracks.values())[:-1])
        saved = [layer.nbytes - layer.bytes_in(self.forms) for layer in self.layers]
        apart = _saved(self.forms) - sum(saved)
        forming = max((formed_bytes(layer.passing(self.forms)) for layer in self.layers), default=0)
        stays = tuple(size - less for size, less in zip(layers, saved, strict=True))
        return Sizes(self.name, self.stage, own - moving - tables - apart, layers, tables, once, stays, forming)

    def moving(self) -> dict[str, list[Layer]]:
        """Track → its layers that pass through slots."""
        stay = {layer for index, layer in enumerate(self.layers) if index in self.share.resident_layers}
        return {name: [layer for layer in layers if layer not in stay] for name, layers in self.tracks.items()}

    def settle(self) -> None:
        """All its tensors have their memory, share that of slots, or will be held in another form."""
        self.weights.forms = self.staying
        formed = {id(layer.weight) for layer in self.staying}
        self._own = [tensor for tensor in self._tensors(self.streamed) if id(tensor) not in formed]

    def bring(self) -> None:
        """Give memory to what is not streamed, and read it. Raises: as `WeightTree.fill`; it can be called again."""
        for tensor in self._own:
            storage = tensor.untyped_storage()
            if storage.nbytes() == 0:
                storage.resize_(span_bytes(tensor))
        clear_padding(self.model, self.staying)
        self.weights.fill(self.weights.places.keys() - self.streamed)
        self.weights.absent = self.streamed
        self.present = True

    def take_out(self) -> None:
        """Free that memory. Tensors keep their shape, dtype and device; only their numbers are gone."""
        self.present = False
        self.weights.absent = frozenset(self.weights.places)
        for tensor in self._own:
            tensor.untyped_storage().resize_(0)
        for layer in self.staying:
            layer.packed = None

    @property
    def staying(self) -> dict[Formed, Form]:
        """Layers that are held in another form for as long as the component is present."""
        passing = {self.weights.places[key].layer for key in self.streamed if self.weights.places[key].name == "weight"}
        return {layer: form for layer, form in self.forms.items() if layer not in passing}

    @property
    def device_bytes(self) -> int:
        """On the device now, besides slots."""
        packed = sum(layer.packed.nbytes for layer in self.staying if layer.packed is not None)
        return packed + sum(tensor.untyped_storage().nbytes() for tensor in self._own)

    @property
    def away_bytes(self) -> int:
        """Of what is not streamed, not on the device now."""
        return 0 if self.present else sum(tensor.nbytes for tensor in self._own) + formed_bytes(self.staying)

    def _tensors(self, without: Set[str] = frozenset()) -> list[Tensor]:
        """What the checkpoint fills, each once."""
        places = [place for key, place in self.weights.places.items() if key not in without]
        return list({(place.layer, place.name): place.tensor for place in places}.values())


def _saved(forms: Mapping[Formed, Form]) -> int:
    """Bytes by which these forms are smaller than the weights as they are read."""
    return sum(layer.weight.nbytes for layer in forms) - formed_bytes(forms)


def span_bytes(tensor: Tensor) -> int:
    """Bytes of a storage that holds the tensor, whatever its order in memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.itemsize if tensor.numel() else 0
