"""Where the weights of a pipeline's components are, and how they come to be where they are computed with.

A pipeline constructs its components on the meta device and adds them here; `load` plans, gives memory and reads. After
that a component is *resident*, *parked* (its weights are on the device only while its stage runs, one parked component
at a time), or *streamed* (its layers take turns in the slots of one ring, which all streamed components share; what it
has besides layers is resident).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import CorruptModel, PeerLost, WeightsUnavailable
from multimodal_gen.memory.file_mover import FileMover
from multimodal_gen.memory.free import free_bytes
from multimodal_gen.memory.host import release_freed_memory
from multimodal_gen.memory.layers import Layer, Track, find_layers, make_slots
from multimodal_gen.memory.plan import plan
from multimodal_gen.memory.ring import Ring
from multimodal_gen.memory.shares import DENOISE, MemoryPlan, Share, Sizes, Wishes
from multimodal_gen.memory.tables import RowsFromFile, find_tables
from multimodal_gen.memory.use import MemoryUse
from multimodal_gen.offload import Residency
from multimodal_gen.parallel.agreement import agree
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.weights.loading import WeightTree, allocate, clear_padding

log = logging.getLogger(__name__)


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
    def sizes(self) -> Sizes:
        """For the plan, before anything has memory."""
        moving = sum(spot.like.nbytes for layer in self.layers for spot in layer.spots)
        own = sum(tensor.nbytes for tensor in self._tensors())
        tables = sum(self.weights.places[key].tensor.nbytes for key in self.tables.values())
        layers = tuple(layer.nbytes for layer in self.layers)
        return Sizes(self.name, self.stage, own - moving - tables, layers, tables)

    def own_tensors(self) -> list[Tensor]:
        """What the checkpoint fills and no slot holds; each storage once."""
        return self._tensors(self.streamed)

    def _tensors(self, without: Set[str] = frozenset()) -> list[Tensor]:
        places = [place for key, place in self.weights.places.items() if key not in without]
        return list({(place.layer, place.name): place.tensor for place in places}.values())


class Memory:
    """All components of one pipeline on one rank. Everything belongs to the engine's thread."""

    def __init__(self, config: EngineConfig, device: torch.device, folder: Path, mesh: Mesh) -> None:
        """
        Args:
            folder: of the model; messages name its files relative to it.
            mesh: the ranks that load at the same time, maybe from the same memory.
        """
        self.plan: MemoryPlan | None = None  # filled by load
        self.use = MemoryUse()
        self.asleep = False
        self._config, self._device, self._folder, self._mesh = config, device, folder, mesh
        self._following: dict[str, str] = {}
        self._components: dict[str, Component] = {}
        self._ring: Ring | None = None
        self._slots: list[Tensor] = []
        self._slot_bytes = 0
        self._layers: dict[int, Layer] = {}

    # --- construction -------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        stage: str,
        model: nn.Module,
        weights: WeightTree,
        tracks: Sequence[Track] = (),
        tables: Sequence[str] = (),
    ) -> Callable[[], AbstractContextManager[None]]:
        """A component on the meta device.

        Args:
            stage: "encode", "denoise" or "decode": when it is needed.
            tracks: its layers, where they can be streamed.
            tables: paths of embeddings whose rows can be read from the file.

        Returns: what to compute inside of: `with here(): ...`.
        """
        weights.verify()
        found: dict[str, list[Layer]] = {}
        for track in tracks:
            found[track.name] = find_layers(model, weights, track.lists, len(self._layers))
            self._layers |= {layer.number: layer for layer in found[track.name]}
        rows = find_tables(model, weights, tables)
        self._components[name] = Component(name, stage, model, weights, found, rows)
        return partial(self.at, name)

    def sizes(self) -> list[Sizes]:
        """Of all components, before anything has memory."""
        return [component.sizes for component in self._components.values()]

    def load(self, working: Mapping[str, int] | None = None) -> None:
        """Plan, give memory, read.

        Args:
            working: stage → bytes of activations that it needs at its worst.

        Raises: ConfigError for what cannot fit, CorruptModel.
        """
        free, host = self._free()
        self.plan = plan(self.sizes(), Wishes.of(self._config), working or {}, free, self._device.type, host)
        for name, share in self.plan.shares.items():
            self._components[name].share = share
        self._make_ring(self.plan)
        self._share_page_cache(self.plan.host_bytes)
        for component in self._components.values():
            allocate(component.model, self._device)
            if component.share.residency == "parked":
                self._take_out(component)
            else:
                self._bring(component)
            component.weights.on_alter = partial(self._altered, component)

    def _free(self) -> tuple[int, int]:
        """On the device, and of the machine where the device is another: the least that any rank finds."""
        sharing = self._mesh.degrees.world * self._config.dp_size
        on_cpu = self._device.type == "cpu"
        found = (free_bytes(self._device, sharing if on_cpu else 1), 0 if on_cpu else free_bytes("cpu", sharing))
        everyone = self._mesh.control.all_gather_bytes("{} {}".format(*found).encode())
        device, host = zip(*(map(int, numbers.split()) for numbers in everyone), strict=True)
        return min(device), min(host)

    def _make_ring(self, plan: MemoryPlan) -> None:
        tracks: dict[str, list[int]] = {}
        for component in self._components.values():
            if component.share.residency != "streamed":
                continue
            stay = set(component.share.resident_layers)
            moving = [layer for index, layer in enumerate(component.layers) if index not in stay]
            component.streamed = frozenset(key for layer in moving for key in layer.keys)
            self._leave_in_file(component)
            for name, layers in component.tracks.items():
                tracks[name] = [layer.number for layer in layers if layer in moving]
        moving = [self._layers[number] for numbers in tracks.values() for number in numbers]
        if not moving:
            return
        mover = FileMover(self._layers, self.use)
        ring = self._ring = Ring(tracks, plan.slots, mover)
        for track, by in self._following.items():
            ring.follow(track, by)
        self._slots = make_slots(moving, plan.slots, self._device)
        self._slot_bytes = self._slots[0].nbytes
        for layer in moving:
            layer.put(self._slots[ring.slot_of(layer.number)])
            layer.module.register_forward_pre_hook(partial(self._enter, ring, layer.number))
            layer.module.register_forward_hook(partial(_leave, ring, layer.number))

    def _share_page_cache(self, budget: int) -> None:
        """Say what is read through the page cache: first what every step needs, as far as the budget goes. What is read
        once, at the start, goes around it where not everything has room."""
        sizes = {name: c.weights.stored_bytes() for name, c in self._components.items()}
        all_fits = sum(sum(found.values()) for found in sizes.values()) <= budget
        for component in sorted(self._components.values(), key=lambda c: c.stage != DENOISE):
            away = component.weights.places if component.share.residency == "parked" else component.streamed
            around = set()
            for key, nbytes in sizes[component.name].items():
                if key in away and nbytes <= budget:
                    budget -= nbytes
                elif key in away or not all_fits:
                    around.add(key)
            component.weights.uncached = frozenset(around)

    def _leave_in_file(self, component: Component) -> None:
        for path, key in component.tables.items():
            component.model.set_submodule(path, RowsFromFile(partial(self._rows, component.weights, key), self._device))
        component.streamed |= frozenset(component.tables.values())

    def _rows(self, weights: WeightTree, key: str, indices: Sequence[int]) -> Tensor:
        with self._reading():
            found = weights.rows(key, indices)
        self.use.moved_bytes += found.nbytes
        return found

    # --- use ----------------------------------------------------------------------------------------------------

    def begin(self, stage: str) -> None:
        """A stage begins: parked components of other stages leave."""
        for component in self._components.values():
            if component.share.residency == "parked" and component.present and component.stage != stage:
                self._take_out(component)

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """While inside, a component can be computed with. Raises: CorruptModel, for files that cannot be read."""
        component = self._components[name]
        if not component.present:
            for other in self._components.values():
                if other.share.residency == "parked" and other.present:
                    self._take_out(other)
            self._together(lambda: self._bring(component))
        yield

    def follow(self, track: str, by: str) -> None:
        """Which track runs after the last layer of another one; at first, the same again."""
        self._following[track] = by
        if self._ring is not None:
            self._ring.follow(track, by)

    def residency(self, name: str) -> Residency:
        """How a component is kept."""
        return self._components[name].share.residency

    def sleep(self) -> None:
        """Free all that weights occupy on the device; addresses of tensors are others after `wake`."""
        if self._ring is not None:
            self._ring.clear()
        for slot in self._slots:
            slot.untyped_storage().resize_(0)
        for component in self._components.values():
            self._take_out(component)
        self.asleep = True
        self._count()

    def wake(self) -> None:
        """Bring back what `sleep` freed, adapters included. Raises: CorruptModel; it may be called again then."""
        for slot in self._slots:
            slot.untyped_storage().resize_(self._slot_bytes)
        for component in self._components.values():
            if component.share.residency != "parked" and not component.present:
                self._bring(component)
        self.asleep = False
        self._count()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What is wrong with a file while the model is in use ends a request, not the model."""
        try:
            yield
        except CorruptModel as error:
            log.error("weights cannot be read: %s", error.message)
            message = error.message.replace(f"{self._folder}/", "")
            raise WeightsUnavailable(f"{message} The model's files must stay where they are while it runs.") from error

    def _enter(self, ring: Ring, number: int, *_: object) -> None:
        self._together(lambda: ring.enter(number))

    def _together(self, work: Callable[[], object]) -> None:
        """Do it on all ranks of a forward, or raise on all: for one that failed alone, others would wait in vain.

        On a CPU, where every layer comes from a file and the vote takes a thousandth of that time. A device would stand
        still for it.
        """
        failure: Exception | None = None
        try:
            with self._reading():
                work()
        except Exception as error:  # noqa: BLE001 - whatever it is, every rank has to learn of it
            failure = error
        for group in (self._mesh.tp, self._mesh.sp) if self._device.type == "cpu" else ():
            try:
                agree(group, failure)
            except PeerLost:
                raise
            except Exception as error:  # noqa: BLE001 - told on
                failure = error
        if failure is not None:
            raise failure

    # --- the parts ----------------------------------------------------------------------------------------------

    def _bring(self, component: Component) -> None:
        tensors = component.own_tensors()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() == 0:
                storage.resize_(_span(tensor))
        clear_padding(component.model)
        component.weights.fill(component.weights.places.keys() - component.streamed)
        component.weights.absent = component.streamed
        component.present = True
        self.use.moved_bytes += sum(tensor.nbytes for tensor in tensors)
        self._count()

    def _take_out(self, component: Component) -> None:
        component.present = False
        component.weights.absent = frozenset(component.weights.places)
        for tensor in component.own_tensors():
            tensor.untyped_storage().resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            release_freed_memory()
        self._count()

    def _altered(self, component: Component, keys: Set[str]) -> None:
        if self._ring is not None and keys & component.streamed:
            self._ring.invalidate(layer.number for layer in component.layers if keys & set(layer.keys))

    def _count(self) -> None:
        slots = sum(slot.untyped_storage().nbytes() for slot in self._slots)
        own = sum(
            tensor.untyped_storage().nbytes()
            for component in self._components.values()
            for tensor in component.own_tensors()
        )
        self.use.device_bytes = slots + own


def _leave(ring: Ring, number: int, *_: object) -> None:
    ring.leave(number)


def _span(tensor: Tensor) -> int:
    """Bytes of a storage that holds the tensor, whatever its order in memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.itemsize if tensor.numel() else 0
