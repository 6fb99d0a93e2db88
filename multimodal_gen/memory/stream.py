"""The layers of all streamed components, and the slots that they take turns in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from functools import partial

import torch
from torch import Tensor

from multimodal_gen.memory.cuda_streams import CudaStreams
from multimodal_gen.memory.device_mover import DeviceMover
from multimodal_gen.memory.file_mover import FileMover
from multimodal_gen.memory.host_images import HostImages
from multimodal_gen.memory.layers import Layer, make_slots
from multimodal_gen.memory.ring import Mover, Ring
from multimodal_gen.memory.shares import MemoryPlan
from multimodal_gen.memory.use import MemoryUse
from multimodal_gen.nn.forms import Form, Formed
from multimodal_gen.weights.loading import WeightTree

Guard = Callable[[Callable[[], object]], None]  # runs something that may fail, and says what that comes to


class Stream:
    """One for all tracks of a pipeline, so that no more slots are held than one pass needs."""

    def __init__(
        self,
        device: torch.device,
        plan: MemoryPlan,
        tracks: Mapping[str, Sequence[Layer]],
        often: Container[Layer],
        use: MemoryUse,
    ) -> None:
        """
        Args:
            tracks: name → its streamed layers in the order of use, on the meta device; they get their slots here.
            often: layers that every step needs; they get the fastest memory of the host.
        """
        self.layers = [layer for layers in tracks.values() for layer in layers]
        self._slots = make_slots(self.layers, plan.slots, device)
        self._slot_bytes = self._slots[0].nbytes
        mover, self._images = make_mover(device, plan, self.layers, often, self._slots, use)
        numbers = {name: [layer.number for layer in layers] for name, layers in tracks.items()}
        self._ring = Ring(numbers, plan.slots, mover)
        for layer in self.layers:
            layer.put(self._slots[self._ring.slot_of(layer.number)])

    def hook(self, guard: Guard, forms: Mapping[Formed, Form]) -> None:
        """From now on every layer waits for its weights before it computes, and lets go of its slot afterwards.

        Args:
            forms: those that weights take in every pass are made then, and gone afterwards.
        """
        ring = weakref.ref(self._ring)  # which holds the layers; they hold the hooks
        for layer in self.layers:
            own = layer.passing(forms)
            layer.module.register_forward_pre_hook(partial(_enter, ring, layer.number, guard, own))
            layer.module.register_forward_hook(partial(_leave, ring, layer.number, own))

    def follow(self, track: str, by: str) -> None:
        """What runs after the last layer of a track, until said otherwise; at first, the track itself again."""
        self._ring.follow(track, by)

    @property
    def kept(self) -> list[Layer]:
        """Layers whose weights are in host memory, so that their files are read only to bring them there."""
        return [] if self._images is None else [layer for layer in self.layers if self._images.kept(layer)]

    def make_images(self) -> None:
        """Bring into host memory what is kept there. Raises: as `WeightTree.fill`; it may be called again then."""
        if self._images is not None:
            self._images.make()

    def alter(self, weights: WeightTree, keys: Set[str]) -> None:
        """What slots and host memory hold of the layers with these checkpoint keys is out of date."""
        numbers = [layer.number for layer in self.layers if layer.weights is weights and keys & set(layer.keys)]
        self._ring.invalidate(numbers)
        if self._images is not None:
            self._images.stale(numbers)

    def sleep(self) -> None:
        """Free slots and host memory; addresses of tensors are others after `wake`."""
        self._ring.clear()
        for slot in self._slots:
            slot.untyped_storage().resize_(0)
        if self._images is not None:
            self._images.drop()

    def wake(self) -> None:
        """Bring back what `sleep` freed. Raises: as `make_images`."""
        for slot in self._slots:
            slot.untyped_storage().resize_(self._slot_bytes)
        self.make_images()

    @property
    def device_bytes(self) -> int:
        """Of the slots."""
        return sum(slot.untyped_storage().nbytes() for slot in self._slots)

    @property
    def tiers(self) -> dict[str, int]:
        """Host tier → bytes."""
        in_file = sum(layer.nbytes for layer in self.layers) - sum(layer.nbytes for layer in self.kept)
        return {"file": in_file, **({} if self._images is None else self._images.used_bytes())}


def make_mover(
    device: torch.device,
    plan: MemoryPlan,
    layers: Sequence[Layer],
    often: Container[Layer],
    slots: Sequence[Tensor],
    use: MemoryUse,
) -> tuple[Mover, HostImages | None]:
    """What fills slots on a device, and from which host memory, where that is not the device's own."""
    if device.type == "cpu":
        return FileMover({layer.number: layer for layer in layers}, use), None
    streams = CudaStreams(device)
    numbers = {layer.number for layer in layers if layer in often}
    images = HostImages(layers, plan.pinned_bytes, plan.host_bytes, streams, numbers)
    return DeviceMover(slots, images, streams, use), images


def _enter(ring: weakref.ref[Ring], number: int, guard: Guard, forms: Mapping[Formed, Form], *_: object) -> None:
    found = ring()
    assert found is not None, "a layer is used after its stream was let go of"

    def enter() -> None:
        found.enter(number)
        for layer, form in forms.items():
            layer.packed = form.pack(layer.weight)

    guard(enter)


def _leave(ring: weakref.ref[Ring], number: int, forms: Iterable[Formed], *_: object) -> None:
    found = ring()
    assert found is not None, "a layer is used after its stream was let go of"
    for layer in forms:
        layer.packed = None
    found.leave(number)
