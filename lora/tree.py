"""One module tree of a loaded model, as adapters see it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set

import torch
from torch import Tensor

from multimodal_gen.errors import CorruptModel, WeightsUnavailable
from multimodal_gen.lora.adapter import Adapter
from multimodal_gen.lora.bind import Spellings
from multimodal_gen.lora.names import AdapterTarget, TreeLayout
from multimodal_gen.lora.updates import Update
from multimodal_gen.weights.loading import Place, Recipe, WeightTree

log = logging.getLogger(__name__)

Members = Sequence[tuple[Adapter, float]]  # adapters with their strengths, in the order of addition
Gathered = dict[str, list[tuple[Update, float]]]  # canonical name → (update, strength) in the order of addition


def gather(members: Members, tree: str) -> Gathered:
    """What `members` do to a tree; strength 0 adds nothing and is left out."""
    found: Gathered = {}
    for adapter, strength in members:
        for name, updates in adapter.trees.get(tree, {}).items() if strength else ():
            found.setdefault(name, []).extend((update, strength) for update in updates)
    return found


def _unavailable(error: CorruptModel) -> WeightsUnavailable:
    log.error("the checkpoint cannot be read again: %s", error.message)  # with the path, which clients must not see
    return WeightsUnavailable(
        "The model's weight files were changed, or cannot be read any more, so adapters cannot be merged or unmerged; "
        "the server's log names the file. Bring it back, or restart the server."
    )


def canonical_names(target: AdapterTarget, keys: Iterable[str]) -> dict[str, str]:
    """Canonical name → the checkpoint's key."""
    return {re.sub(f"^(?:{target.strip})?", "", key): key for key in keys}


class AdaptedTree:
    """Canonical names (a target's spelling of the checkpoint's) → places and pristine weights."""

    def __init__(self, target: AdapterTarget, weights: WeightTree) -> None:
        self.target = target
        self.weights = weights
        self._keys = canonical_names(target, weights.shapes)
        shapes = {name: weights.shapes[key] for name, key in self._keys.items()}
        inert = {name.rpartition(".")[0] or name for name, key in self._keys.items() if key not in weights.places}
        self.spellings = Spellings(TreeLayout(target, shapes, frozenset(inert)))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.weights.model.parameters()).device

    def place(self, name: str) -> Place:
        """Where the weight of a canonical name lives."""
        return self.weights.places[self._keys[name]]

    def check(self) -> None:
        """Raises: WeightsUnavailable when the checkpoint is not as it was."""
        try:
            self.weights.check()
        except CorruptModel as error:
            raise _unavailable(error) from error

    def pristine(self, names: Iterable[str], whole: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, W0 as the checkpoint holds it, or the piece of it that this rank holds).

        `whole` are names whose W0 is wanted whole all the same. Raises: WeightsUnavailable.
        """
        wanted = {self._keys[name]: name for name in names}
        entire = {key for key, name in wanted.items() if name in whole}
        try:
            for key, tensor in self.weights.read(wanted, entire):
                yield wanted[key], tensor
        except CorruptModel as error:
            raise _unavailable(error) from error

    def rewrite(
        self,
        recipes: Mapping[str, Recipe],
        names: Set[str],
        on_weight: Callable[[], None] = lambda: None,
        doubtful: Set[str] = frozenset(),
    ) -> None:
        """Make the weights of these canonical names by `recipes`, those without one pristine.

        What is in memory is written now, `on_weight` after each; the rest when it comes.

        Args:
            doubtful: names whose recipe may fail, so that it is tried out now where the weight is not in memory.

        Raises: WeightsUnavailable; what a recipe raised.
        """
        keys = {self._keys[name] for name in names}
        self.weights.alter({self._keys[name]: recipe for name, recipe in recipes.items()}, keys)
        try:
            self.weights.try_out(self.weights.absent & {self._keys[name] for name in doubtful})
            self.weights.fill(keys - self.weights.absent, on_weight)
        except CorruptModel as error:
            raise _unavailable(error) from error

    def gather(self, members: Members) -> Gathered:
        """What `members` do to this tree."""
        return gather(members, self.target.tree)
