"""One model of a pipeline, as memory sees it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from torch import Tensor, nn

from multimodal_gen.memory.layers import Layer
from multimodal_gen.memory.shares import DENOISE, Share, Sizes
from multimodal_gen.weights.loading import WeightTree


@dataclass(eq=False)
class Component:
    """One model of a pipeline; filled by `Memory`."""

    name: str
    stage: str
    model: nn.Module
    weights: WeightTree
    tracks: dict[str, list[Layer]]  # every layer that could be streamed, in the order of use
    tables: dict[str, str]  # path of an embedding that could stay in its file → its checkpoint key
    share: Share = field(default_factory=lambda: Share("resident"))
    streamed: frozenset[str] = frozenset()  # checkpoint keys that pass through slots
    present: bool = False  # whether what is not streamed is on the device

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
        # Of several tracks the last is the one of every step.
        once = sum(len(track) for track in list(self.tracks.values())[:-1])
        return Sizes(self.name, self.stage, own - moving - tables, layers, tables, once)

    def own_tensors(self) -> list[Tensor]:
        """What the checkpoint fills and no slot holds; each storage once."""
        return self._tensors(self.streamed)

    def _tensors(self, without: Set[str] = frozenset()) -> list[Tensor]:
        places = [place for key, place in self.weights.places.items() if key not in without]
        return list({(place.layer, place.name): place.tensor for place in places}.values())
