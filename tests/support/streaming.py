"""A real checkpoint and a model of small layers that are streamed, in loops full of accidents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multimodal_gen.errors import CorruptModel
from multimodal_gen.memory.layers import Layer, LayerList, find_layers, make_slots
from multimodal_gen.memory.ring import Ring
from multimodal_gen.nn.linear import FusedLinear, Linear
from multimodal_gen.weights.loading import Change, Rename, WeightTree, construction

RENAMES = (Rename(r"(.*)to_(q|k)\.weight", r"\1qk.weight", r"\2"),)
Alter = Callable[[Iterable[int]], None]


class Block(nn.Module):
    """A layer with fused parts, padding, a cast and a norm."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.qk = FusedLinear(width, {"q": 3, "k": 5}, multiple=8)
        self.out = Linear(width, out, bias=True, stored_in=width + 3)
        self.norm = nn.Parameter(torch.empty(width, dtype=torch.float32), requires_grad=False)


@dataclass(frozen=True)
class Shift:
    """A recipe: every number grows."""

    amount: int
    whole: bool = False

    def begin(self, device: torch.device, dtype: torch.dtype) -> Change:
        """See `Recipe`."""
        return lambda rows, pristine: (pristine + self.amount).to(device, dtype)


class Stack:
    """Layers with their checkpoint; every number is a small integer, exact in all dtypes on the way."""

    def __init__(self, random: Random, folder: Path, kind: type[Layer] = Layer) -> None:
        names = "abc"[: random.randint(1, 3)]
        with construction(torch.device("meta"), torch.bfloat16):
            self.model = nn.ModuleDict(
                {
                    name: nn.ModuleList(Block(random.randint(1, 5), random.randint(1, 7)) for _ in range(size))
                    for name, size in ((name, random.randint(1, 6)) for name in names)
                }
            )
        self.file = folder / "model.safetensors"
        self.pristine = _checkpoint(self.model)
        save_file({key: tensor.clone() for key, tensor in self.pristine.items()}, self.file)
        self.weights = WeightTree(self.model, [self.file], RENAMES)
        self.layers: dict[int, Layer] = {}
        self.tracks: dict[str, list[int]] = {}
        for name in names:
            found = find_layers(self.model, self.weights, [LayerList(name)], len(self.layers))
            self.layers |= {layer.number: kind(**vars(layer)) for layer in found}
            self.tracks[name] = [layer.number for layer in found]
        self.weights.uncached = frozenset(key for key in self.pristine if random.random() < 0.3)
        self.amounts = dict.fromkeys(self.pristine, 0)

    def slots(self, count: int) -> list[Tensor]:
        """Full of what nobody may compute with."""
        slots = make_slots(list(self.layers.values()), count, torch.device("cpu"))
        for slot in slots:
            slot.fill_(0x7F)
        return slots

    def put(self, ring: Ring, slots: list[Tensor]) -> None:
        """Layers live in their slots from now on."""
        for number, layer in self.layers.items():
            layer.put(slots[ring.slot_of(number)])

    def alter(self, random: Random) -> None:
        """Other adapters on some of the weights."""
        keys = {key for key in self.pristine if random.random() < 0.4}
        for key in keys:
            self.amounts[key] = random.randint(0, 50)
        recipes = {key: Shift(self.amounts[key]) for key in keys if self.amounts[key]}
        self.weights.alter(recipes, keys)

    def told(self, invalidate: Alter) -> None:
        """Whom to tell of layers that are altered, as `Memory` does."""

        def altered(keys: Set[str]) -> None:
            invalidate([number for number, layer in self.layers.items() if keys & set(layer.keys)])

        self.weights.on_alter = altered

    def check(self, number: int) -> Callable[[], str | None]:
        """What finds, later, whether memory holds the layer as it is meant to be now; says what is wrong."""
        layer, amounts = self.layers[number], {key: self.amounts[key] for key in self.layers[number].keys}
        return lambda: self._fault(layer, amounts)

    def _fault(self, layer: Layer, amounts: Mapping[str, int]) -> str | None:
        for key, amount in amounts.items():
            if not torch.equal(self.weights.places[key].view().float(), self.pristine[key] + amount):
                return f"layer {layer.number} was computed with while {key} was another's, older or not yet there"
        if any(view.any() for owner in layer.padded for view in owner.padding()):
            return f"layer {layer.number} was computed with while its padding was not zero"
        return None


def _checkpoint(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Block):
            width, out = len(module.norm), len(module.out.weight)
            shapes |= {f"{name}.to_q.weight": (3, width), f"{name}.to_k.weight": (5, width), f"{name}.norm": (width,)}
            shapes |= {f"{name}.out.weight": (out, width), f"{name}.out.bias": (out,)}
    return {key: torch.randint(-9, 10, shape, generator=generator).float() for key, shape in shapes.items()}


class Accidents:
    """Runs tracks of a ring, with whatever may happen in between."""

    def __init__(self, stack: Stack, ring: Ring, random: Random, compute: Callable[[int], None]) -> None:
        """`compute`: hands over the computing with a layer that is there."""
        self.stack, self.ring, self.random, self._compute = stack, ring, random, compute
        self._away = stack.file.with_suffix(".away")
        self.failures = 0  # passes that ended because a file could not be read

    def run(self, passes: int, sleep: Callable[[], None], wake: Callable[[], None]) -> None:
        """Raises: CorruptModel for a pass that failed though the file is where it was."""
        names = list(self.stack.tracks)
        for _ in range(passes):
            chance = self.random.random()
            if chance < 0.15:
                self.stack.alter(self.random)
            elif chance < 0.25:
                self.ring.follow(self.random.choice(names), self.random.choice(names))
            elif chance < 0.30:
                sleep()
                self._bring_back()
                wake()
            elif chance < 0.36 and not self._away.exists():
                self.stack.file.rename(self._away)
            elif chance < 0.46:
                self._bring_back()
            self._pass(self.random.choice(names))
        self._bring_back()
        self._pass(names[0])

    def _pass(self, name: str) -> None:
        cancelled = self.random.random() < 0.2
        for number in self.stack.tracks[name]:
            if not self._enter(number):
                return
            self._compute(number)
            if cancelled and self.random.random() < 0.3:
                return  # in the middle of a layer
            self.ring.leave(number)
            if cancelled and self.random.random() < 0.3:
                return  # between two

    def _enter(self, number: int) -> bool:
        if not self._away.exists():
            self.ring.enter(number)
            return True
        try:
            self.ring.enter(number)
        except CorruptModel:
            self.failures += 1
            return False
        return True

    def _bring_back(self) -> None:
        if self._away.exists():
            self._away.rename(self.stack.file)
