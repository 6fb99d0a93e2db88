"""Where the weights of a pipeline's components are, and how they come to be where they are computed with.

A pipeline constructs its components on the meta device and adds them here; `load` plans, gives memory and reads. After
that a component is *resident*, *parked* (its weights are on the device only while its stage runs, one parked component
at a time), or *streamed* (its layers take turns in the slots of one ring, which all streamed components share; what it
has besides layers is resident).
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import CorruptModel, PeerLost, WeightsUnavailable
from multimodal_gen.memory.component import Component
from multimodal_gen.memory.estimate import Load
from multimodal_gen.memory.free import free_bytes
from multimodal_gen.memory.host import release_freed_memory
from multimodal_gen.memory.layers import Layer, Track, find_layers
from multimodal_gen.memory.measure import preflight
from multimodal_gen.memory.plan import plan_usual
from multimodal_gen.memory.shares import DENOISE, MemoryPlan, Sizes, Wishes
from multimodal_gen.memory.stream import Stream
from multimodal_gen.memory.tables import RowsFromFile, find_tables
from multimodal_gen.memory.use import MemoryUse
from multimodal_gen.nn.forms import choose, losses_in_words
from multimodal_gen.nn.quantize import fewer_bits
from multimodal_gen.parallel.agreement import agree
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.request import ModelCard
from multimodal_gen.weights.loading import WeightTree, allocate

log = logging.getLogger(__name__)

_without_weights = ContextVar("_without_weights", default=False)


Working = Mapping[str, int]  # stage → bytes that it needs beside the weights


@contextmanager
def without_weights() -> Iterator[None]:
    """Pipelines that are constructed inside stay on the meta device: for those who want to know their sizes."""
    token = _without_weights.set(True)
    try:
        yield
    finally:
        _without_weights.reset(token)


class Memory:
    """All components of one pipeline on one rank. Everything belongs to the engine's thread."""

    def __init__(self, config: EngineConfig, device: torch.device, folder: Path, mesh: Mesh) -> None:
        """
        Args:
            folder: of the model; messages name its files relative to it.
            mesh: the ranks that load at the same time, maybe from the same memory.
        """
        self.plan: MemoryPlan | None = None  # filled by load
        self.usual: Working = {}  # for a request of the default size; filled by load
        self.least: Working = {}  # for the smallest request; filled by load
        self.use = MemoryUse()
        self.asleep = False
        self._config, self._device, self._folder, self._mesh = config, device, folder, mesh
        self._components: dict[str, Component] = {}
        self._layers = 0  # of all components
        self._stream: Stream | None = None  # where something streams
        self._following: dict[str, str] = {}
        self._stage = ""  # of the verb that runs

    # --- construction -------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        stage: str,
        model: nn.Module,
        weights: WeightTree,
        tracks: Sequence[Track] = (),
        tables: Sequence[str] = (),
        high: Sequence[str] | None = None,
    ) -> Callable[[], AbstractContextManager[None]]:
        """A component on the meta device.

        Args:
            stage: "encode", "denoise" or "decode": when it is needed.
            tracks: its layers, where they can be streamed.
            tables: paths of embeddings whose rows can be read from the file.
            high: patterns of layers that --quantize leaves as they are; None: it leaves all of them so.

        Returns: what to compute inside of: `with here(): ...`.
        """
        weights.verify()
        found: dict[str, list[Layer]] = {}
        for track in tracks:
            found[track.name] = find_layers(model, weights, track.lists, self._layers)
            self._layers += len(found[track.name])
        rows = find_tables(model, weights, tables)
        fewer = fewer_bits(self._config.quantize if high is not None else "none", self._device)
        forms = choose(model, self._device, fewer, high or ())
        weights.exact = all(form.exact for form in forms.values())
        self._components[name] = Component(name, stage, model, weights, found, rows, forms)
        return partial(self.at, name)

    def stays(self, name: str) -> bool:
        """Whether a component is on the device always."""
        return self.plan is None or self.plan.shares[name].residency == "resident"

    def sizes(self) -> list[Sizes]:
        """Of all components, before anything has memory."""
        return [component.sizes for component in self._components.values()]

    def load(self, card: ModelCard, dtype: torch.dtype, working: Callable[[int, int, int], Working]) -> None:
        """Plan for requests of the default size, or for the smallest where that cannot be; give memory; read.

        Args:
            dtype: that steps compute in.
            working: (width, height, frames) of a request → what its stages work with.

        Raises: ConfigError for what cannot fit, CorruptModel.
        """
        usual = card.defaults
        self.usual = working(usual.width, usual.height, usual.num_frames)
        self.least = working(card.min_side, card.min_side, 1)
        if _without_weights.get():
            return
        self.plan = self._planned()
        self._preflight(card, dtype)
        for name, share in self.plan.shares.items():
            self._components[name].share = share
        self._make_stream(self.plan)
        for component in self._components.values():
            allocate(component.model, self._device, component.staying)
            component.settle()
            if component.parked:
                self._take_out(component)
            else:
                self._bring(component)
            component.weights.on_alter = partial(_altered, weakref.ref(self), component.name)
            if component.weights.losses:
                words = losses_in_words(component.model, component.weights.losses)
                log.info("%s in %s: %s", component.name, self._config.quantize, words)

    def _planned(self) -> MemoryPlan:
        wishes, (free, host) = Wishes.of(self._config), self._free()
        made, warning = plan_usual(self.sizes(), wishes, self.usual, self.least, free, self._device.type, host)
        if warning is not None:
            log.warning("%s", warning)
        return made

    def _preflight(self, card: ModelCard, dtype: torch.dtype) -> None:
        """Say the plan, before minutes of reading."""
        assert self.plan is not None
        files = [path for component in self._components.values() for path in component.weights.files]
        lines, _ = preflight(self.plan, self.sizes(), Load.of(card), files, self._device, dtype)
        placed = any(share.residency != "resident" for share in self.plan.shares.values())
        for line in lines if placed else lines[-1:]:  # where nothing leaves, the peak is all there is to say
            log.info("memory: %s", line)

    def _free(self) -> tuple[int, int]:
        """On the device, and of the machine where the device is another: the least that any rank finds."""
        sharing = self._mesh.degrees.world * self._mesh.loading
        on_cpu = self._device.type == "cpu"
        found = (free_bytes(self._device, sharing if on_cpu else 1), 0 if on_cpu else free_bytes("cpu", sharing))
        everyone = self._mesh.control.all_gather_bytes("{} {}".format(*found).encode())
        device, host = zip(*(map(int, numbers.split()) for numbers in everyone), strict=True)
        return min(device), min(host)

    def _make_stream(self, plan: MemoryPlan) -> None:
        tracks: dict[str, list[Layer]] = {}
        for component in self._components.values():
            if component.share.residency == "streamed":
                moving = component.moving()
                tracks |= moving
                component.streamed = frozenset(
                    key for layers in moving.values() for layer in layers for key in layer.keys
                )
                self._leave_in_file(component)
        often = {layer for component in self._components.values() for layer in component.every_step}
        kept: list[Layer] = []
        if any(tracks.values()):
            stream = self._stream = Stream(self._device, plan, tracks, often, self.use)
            forms = {layer: form for component in self._components.values() for layer, form in component.forms.items()}
            stream.hook(partial(_together, weakref.ref(self)), forms)
            for track, by in self._following.items():
                stream.follow(track, by)
            kept = stream.kept
        self._share_page_cache(plan.host_bytes - sum(layer.nbytes for layer in kept), kept)
        if self._stream is not None:
            self._stream.make_images()

    def _share_page_cache(self, budget: int, kept: Sequence[Layer]) -> None:
        """Say what is read through the page cache: first what every step needs, as far as the budget goes. What is read
        once, at the start or to be `kept`, goes around it where not everything has room."""
        sizes = {name: c.weights.stored_bytes() for name, c in self._components.items()}
        all_fits = sum(sum(found.values()) for found in sizes.values()) <= budget
        for component in sorted(self._components.values(), key=lambda c: c.stage != DENOISE):
            once = {key for layer in kept if layer.weights is component.weights for key in layer.keys}
            away = component.weights.places if component.parked else component.streamed - once
            around = set()
            for key, nbytes in sizes[component.name].items():
                if key in away and nbytes <= budget:
                    budget -= nbytes
                elif key in away or not all_fits:
                    around.add(key)
            component.weights.uncached = frozenset(around)

    def _leave_in_file(self, component: Component) -> None:
        for path, key in component.tables.items():
            rows = partial(_rows, weakref.ref(self), component.name, key)
            component.model.set_submodule(path, RowsFromFile(rows, self._device))
        component.streamed |= frozenset(component.tables.values())

    def rows(self, name: str, key: str, indices: Sequence[int]) -> Tensor:
        """Of a table that stays in its file. Raises: WeightsUnavailable."""
        found: list[Tensor] = []
        component = self._components[name]
        self.together(lambda: found.append(component.weights.rows(key, indices)))
        self.use.moved_bytes += found[0].nbytes
        return found[0]

    # --- use ----------------------------------------------------------------------------------------------------

    @property
    def alternates(self) -> bool:
        """Whether stages may take turns piece by piece: weights of none leave when another one begins."""
        return not any(component.parked for component in self._components.values())

    def begin(self, stage: str) -> None:
        """A verb of the pipeline begins; parked components of other stages leave.

        Encoding may find all in its cache, so nobody leaves before an encoder comes.
        """
        self._stage = stage
        for component in self._components.values() if stage != "encode" else ():
            if component.parked and component.present and component.stage != stage:
                self._take_out(component)

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """While inside, a component can be computed with. Raises: CorruptModel, for files that cannot be read."""
        component = self._components[name]
        if not component.present:
            for other in self._components.values():
                if other.parked and other.present:
                    self._take_out(other)
            begin = time.monotonic()
            try:
                self.together(lambda: self._bring(component))
            except BaseException:  # maybe on another rank
                self._take_out(component)
                raise
            self.use.loads += 1
            self.use.stall_seconds += time.monotonic() - begin
        yield

    def follow(self, track: str, by: str) -> None:
        """Which track runs after the last layer of another one; at first, the same again."""
        self._following[track] = by
        if self._stream is not None:
            self._stream.follow(track, by)

    def sleep(self) -> None:
        """Free all that weights occupy on the device; addresses of tensors are others after `wake`."""
        if self._stream is not None:
            self._stream.sleep()
        for component in self._components.values():
            self._take_out(component)
        self.asleep = True
        self._count()

    def wake(self) -> None:
        """Bring back what `sleep` freed, adapters included. Raises: CorruptModel, also for files that are needed later
        only; it may be called again then."""
        for component in self._components.values():
            component.weights.check()
        if self._stream is not None:
            self._stream.wake()
        for component in self._components.values():
            if not component.parked and not component.present:
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

    def together(self, work: Callable[[], object]) -> None:
        """Do it on all ranks of a forward, or raise on all: for one that failed alone, others would wait in vain.

        In a step, branches of guidance are forwards of their own, and agree where they meet (`BranchShare.compute`);
        encoding and decoding is the same work for all ranks.

        On a CPU, where every layer comes from a file and the vote takes a thousandth of that time. A device would stand
        still for it.
        """
        ranks = (self._mesh.tp, self._mesh.sp) if self._stage == DENOISE else (self._mesh.control,)
        failure: Exception | None = None
        try:
            with self._reading():
                work()
        except Exception as error:  # noqa: BLE001 - whatever it is, every rank has to learn of it
            failure = error
        for group in ranks if self._device.type == "cpu" else ():
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
        component.bring()
        self.use.moved_bytes += component.device_bytes
        self._count()

    def _take_out(self, component: Component) -> None:
        component.take_out()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            release_freed_memory()
        self._count()

    def altered(self, name: str, keys: Set[str]) -> None:
        """These tensors of a component are made in another way from now on."""
        component = self._components[name]
        if self._stream is not None and keys & component.streamed:
            self._stream.alter(component.weights, keys)

    def _count(self) -> None:
        components = self._components.values()
        own = sum(component.device_bytes for component in components)
        away = sum(component.away_bytes for component in components)
        slots, tiers = (0, {"file": 0}) if self._stream is None else (self._stream.device_bytes, self._stream.tiers)
        self.use.device_bytes = own + slots
        self.use.tiers = {"device": own + slots, **tiers, "file": tiers["file"] + away}


# What a model's modules and weights call. They hold no reference to `Memory`, which holds them: whoever lets go of a
# pipeline has its memory back at once, not when the collector of cycles comes by.
_Weak = weakref.ref["Memory"]


def _of(memory: _Weak) -> Memory:
    found = memory()
    assert found is not None, "a model is used after its pipeline was let go of"
    return found


def _together(memory: _Weak, work: Callable[[], object]) -> None:
    _of(memory).together(work)


def _rows(memory: _Weak, name: str, key: str, indices: Sequence[int]) -> Tensor:
    return _of(memory).rows(name, key, indices)


def _altered(memory: _Weak, name: str, keys: Set[str]) -> None:
    _of(memory).altered(name, keys)
