"""The adapters of one loaded model: changes as transactions, and what each request computes with.

A change is staged (read, checked, decided: in any thread, altering nothing) and then committed between two steps. A
commit alters what new requests get. The weights follow when the scheduler runs rows of another set (`set_weights`):
rows that run keep the weights that they began with, and no output is ever a mixture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import msgspec

from multimodal_gen.adapters import LoraState, Pin
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import AdapterError, AdapterUnavailable
from multimodal_gen.lora.applied import BASE, Applied, SetKey, TreeUse, WeightsKey, set_key
from multimodal_gen.lora.changes import Staged, Stager
from multimodal_gen.lora.merge import MergedTree
from multimodal_gen.lora.names import AdapterTarget
from multimodal_gen.lora.overlay import make_overlay, merge_only_error
from multimodal_gen.lora.policy import Choice, Traffic
from multimodal_gen.lora.store import AdapterStore, Limits, Loaded
from multimodal_gen.lora.tree import AdaptedTree, Members
from multimodal_gen.nn.lowrank import Overlay
from multimodal_gen.parallel.agreement import agree
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.request import GenerationRequest
from multimodal_gen.weights.loading import WeightTree

OVERLAY_BYTES = 256 << 20
MAX_OWN_RANK = 1024  # of all adapters of a request's own list together
REMEMBERED_SETS = 64

Pins = tuple[Pin, ...]


class LoraManager:
    """One per engine; everything belongs to the engine's thread."""

    def __init__(
        self,
        targets: Sequence[AdapterTarget],
        weights: Mapping[str, WeightTree],
        config: EngineConfig,
        on_layer: Callable[[], None] = lambda: None,
        ranks: Group = SOLO,
    ) -> None:
        """
        Args:
            targets: of the family; those without weights here are left out.
            weights: tree → its weights.
            on_layer: called after every weight that a merge wrote.
            ranks: all of the replica (`Mesh.control`): each has a manager and calls the same methods of it at the same
                point. What fails on one of them fails on all.
        """
        self.trees = {t.tree: AdaptedTree(t, weights[t.tree]) for t in targets if t.tree in weights}
        limits = Limits(
            *(config.max_loras, config.max_lora_mb, config.max_lora_rank),
            flag="--max-loras",
            cure="unload one (DELETE /v1/loras/NAME)",
        )
        self.store = AdapterStore(limits, {name: tree.spellings for name, tree in self.trees.items()})
        self.state = LoraState()
        self._ranks = ranks
        self._fixed = config.deterministic  # the way a set is applied never follows the traffic
        self._choices: Mapping[str, Choice] = {}
        self._merged = {name: MergedTree(tree, on_layer, ranks) for name, tree in self.trees.items()}
        self._weights: dict[str, SetKey] = {}
        self._traffic = Traffic()
        self._ways: OrderedDict[tuple[str, SetKey], bool] = OrderedDict()  # sets that were active → merged?
        self._overlays: OrderedDict[tuple[str, SetKey], Overlay] = OrderedDict()

    @property
    def broken(self) -> bool:
        """Whether the weights are in no known state."""
        return any(merged.broken for merged in self._merged.values())

    # --- changes ----------------------------------------------------------------------------------------------------

    def stager(self) -> Stager:
        """What works a change out, in any thread, from the state of now: the same on all ranks, whatever `note` does
        meanwhile. No other change may be staged or committed before its own is.
        """
        return Stager(self.store, self.trees, self.state, self._choices)

    def commit(self, staged: Staged, *, weights_too: bool) -> None:
        """Make it so. With `weights_too`, merging is part of the transaction.

        Raises: what merging raised; nothing has changed then.
        """
        before = self.store.by_name, self.state, self._choices
        self._become(staged.names, staged.state, staged.choices)
        if not weights_too:
            return
        weights = {tree: (merged.members, self._weights.get(tree, ())) for tree, merged in self._merged.items()}
        try:
            self.set_weights(self._active().weights)
        except BaseException:
            self._become(*before)
            for tree, (members, key) in weights.items():  # another tree may have been written already
                if self._weights.get(tree, ()) != key:
                    self._merged[tree].set(members)
                    self._weights[tree] = key
            raise

    def _become(self, names: Mapping[str, Loaded], state: LoraState, choices: Mapping[str, Choice]) -> None:
        used = {pin.digest for pin in state.active}
        self.store.replace(names, used)
        if state.active != self.state.active:
            self._traffic = Traffic()
        self._overlays.clear()  # rows that run hold theirs; those of sets that come back are made again
        self.state, self._choices = state, choices
        for tree, choice in choices.items():
            self._remember(tree, choice.merged)

    def _remember(self, tree: str, merged: bool) -> None:
        self._ways[tree, _key(self.state.active, tree)] = merged
        self._ways.move_to_end((tree, _key(self.state.active, tree)))
        while len(self._ways) > REMEMBERED_SETS:
            self._ways.popitem(last=False)

    # --- requests ---------------------------------------------------------------------------------------------------

    def apply(self, request: GenerationRequest) -> Applied:
        """What the rows of a request compute with; overlays are not made yet.

        Raises: AdapterUnavailable, AdapterNotFound, AdapterMergeOnly, AdapterError.
        """
        if not request.loras:
            return BASE
        lost = next((self.state.missing[p.digest] for p in request.loras if p.digest in self.state.missing), None)
        if lost is not None:
            raise AdapterUnavailable(
                f"An active adapter could not be loaded again after the worker restarted. {lost} Set the adapters anew."
            )
        if request.own_loras:
            self._check_rank(request.loras)
        return Applied({tree: self._use(tree, request) for tree in dict.fromkeys(pin.tree for pin in request.loras)})

    def equip(self, applied: Applied) -> Applied:
        """The same with its overlays, for the rows that start now. Raises: AdapterError; what allocating raised."""
        uses = {
            tree: replace(use, overlay=self._overlay(tree, use.beside)) if use.beside and use.overlay is None else use
            for tree, use in applied.trees.items()
        }
        return Applied(uses)

    def _check_rank(self, pins: Pins) -> None:
        """Whoever may send requests must not make each of them as large as the model."""
        total = sum(self.store.find(digest).rank for digest in {pin.digest for pin in pins})
        if total > MAX_OWN_RANK:
            raise AdapterError(
                f"The adapters of this request have ranks of {total} together; {MAX_OWN_RANK} is the limit.",
                param="loras",
            )

    def pin(self, request: GenerationRequest) -> Callable[[], None]:
        """Keep the request's adapters until the returned function is called."""
        return self.store.pin({pin.digest for pin in request.loras})

    def note(self, request: GenerationRequest) -> bool:
        """Count a request for the `auto` policy; returns whether it changed how the active set is applied."""
        self._traffic.note(request.own_loras and request.loras != self.state.active)
        movable = {} if self._fixed else {tree: c.merged for tree, c in self._choices.items() if not c.settled}
        moved = {tree: not now for tree, now in movable.items() if self._traffic.merged(now) != now}
        for tree, merged in moved.items():
            reason = "one set dominates" if merged else "requests mix sets"
            self._choices = {**self._choices, tree: Choice(merged, reason, settled=False)}
            self.state = msgspec.structs.replace(
                self.state,
                merged={**self.state.merged, tree: merged},
                reasons={**self.state.reasons, tree: reason},
            )
            self._remember(tree, merged)
        return bool(moved)

    def _use(self, tree: str, request: GenerationRequest) -> TreeUse:
        key = _key(request.loras, tree)
        if self._is_merged(tree, key, request.own_loras):
            return TreeUse(merged=key)
        reason = next(filter(None, (self.store.find(digest).merge_only(tree) for digest, _ in key)), "")
        if reason:
            raise merge_only_error(reason)
        return TreeUse(beside=key)

    def _is_merged(self, tree: str, key: SetKey, own: bool) -> bool:
        """Own lists run merged only where they happen to be the active set, and never where bits matter: the same
        request must not depend on what is active."""
        if own and (self._fixed or key != _key(self.state.active, tree)):
            return False
        way = self._ways.get((tree, key))
        if way is not None:
            return way
        # Pinned before the worker was restarted.
        return any(self.store.find(digest).merge_only(tree) for digest, _ in key)

    def _active(self) -> Applied:
        trees = [tree for tree, choice in self._choices.items() if choice.merged]
        return Applied({tree: TreeUse(merged=_key(self.state.active, tree)) for tree in trees})

    def _overlay(self, tree: str, key: SetKey) -> Overlay | None:
        if (tree, key) in self._overlays:
            self._overlays.move_to_end((tree, key))
            return self._overlays[tree, key]
        overlay, failure = None, None
        try:
            overlay = make_overlay(self.trees[tree], self._members(key))
        except Exception as error:  # noqa: BLE001 - whatever it is, every rank has to learn of it
            failure = error
        agree(self._ranks, failure)
        if overlay is not None:
            self._overlays[tree, key] = overlay
            while sum(kept.nbytes for kept in self._overlays.values()) > OVERLAY_BYTES and len(self._overlays) > 1:
                self._overlays.popitem(last=False)
        return overlay

    # --- weights ----------------------------------------------------------------------------------------------------

    def set_weights(self, wanted: WeightsKey) -> None:
        """Bring the weights of every tree to `wanted`; nothing is done for those that are there.

        Raises: what reading or merging raised; the tree at fault is as before, or `broken`.
        """
        keys = dict(wanted)
        for tree, merged in self._merged.items():
            key = keys.get(tree, ())
            if key != self._weights.get(tree, ()):
                merged.set(self._members(key))
                self._weights[tree] = key

    def forget_overlays(self) -> None:
        """Let go of what runs beside the weights; overlays are made again when they are asked for."""
        self._overlays.clear()

    def _members(self, key: SetKey) -> Members:
        return [(self.store.find(digest), strength) for digest, strength in key]


def _key(pins: Pins, tree: str) -> SetKey:
    return set_key(pin for pin in pins if pin.tree == tree)
