"""What a change would come to, worked out without altering anything: the stage before a commit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from multimodal_gen.adapters import (
    AdapterSource,
    Change,
    LoadLora,
    LoraState,
    MergeLora,
    MergeMode,
    Pin,
    RestoreLora,
    SetLora,
    Target,
    UnloadLora,
    UnmergeLora,
    check_strength,
    expand,
)
from multimodal_gen.errors import AdapterError, AdapterInUse, AdapterMergeOnly, AdapterNotFound, did_you_mean
from multimodal_gen.lora.adapter import Adapter
from multimodal_gen.lora.merge import rounding_loss
from multimodal_gen.lora.policy import Choice, choose
from multimodal_gen.lora.store import AdapterStore, Loaded
from multimodal_gen.lora.tree import AdaptedTree


@dataclass(frozen=True)
class Staged:
    """The state after the change, ready to be committed."""

    names: Mapping[str, Loaded]
    state: LoraState
    choices: Mapping[str, Choice]  # per tree with active adapters
    changed: bool


@dataclass(frozen=True)
class Stager:
    """The state before the change; `stage` reads files and raises the AdapterError family."""

    store: AdapterStore
    trees: Mapping[str, AdaptedTree]
    state: LoraState
    choices: Mapping[str, Choice]

    def stage(self, change: Change) -> Staged:
        """Work out any change."""
        if not self.trees:
            raise AdapterError(
                "This model takes no adapters: it runs through diffusers, and adapters need a native family "
                "(`mmgen models` lists those)."
            )
        if isinstance(change, SetLora):
            return self._set(change)
        if isinstance(change, LoadLora):
            name = change.source.nickname
            if any(pin.nickname == name for pin in self.state.active):
                raise AdapterInUse(f"Adapter {name!r} is active; load the file under another name, or use set_lora.")
            names = self._with([change.source])
            return self._staged(names, self.state.remembered, self.state.active, self.state.modes)
        if isinstance(change, UnloadLora):
            return self._unload(change.nickname)
        if isinstance(change, MergeLora):
            return self._merge(change)
        if isinstance(change, UnmergeLora):
            trees = self._targeted(change.target)
            active = tuple(pin for pin in self.state.active if pin.tree not in trees)
            return self._staged(self.store.by_name, self.state.remembered, active, self.state.modes)
        assert isinstance(change, RestoreLora), f"{type(change).__name__} is for the language model"
        return self._restore(change)

    # --- the changes ------------------------------------------------------------------------------------------------

    def _set(self, change: SetLora) -> Staged:
        names = self._with(change.sources)
        infos = {name: loaded.info for name, loaded in names.items()}
        pins = expand(change.uses, infos, tuple(self.trees), "lora_nickname", "target")
        return self._staged(names, pins or self.state.remembered, pins, dict.fromkeys(self.trees, change.mode))

    def _unload(self, nickname: str) -> Staged:
        names = dict(self.store.by_name)
        if nickname not in names:
            raise AdapterNotFound(f"No adapter {nickname[:128]!a} is loaded.{did_you_mean(nickname[:128], names)}")
        if any(pin.nickname == nickname for pin in self.state.active):
            raise AdapterInUse(
                f"Adapter {nickname!r} is active. Activate others with set_lora, or none with unmerge_lora_weights, "
                "then unload it."
            )
        del names[nickname]
        return self._staged(names, self.state.remembered, self.state.active, self.state.modes)

    def _merge(self, change: MergeLora) -> Staged:
        trees = self._targeted(change.target)
        again = [pin for pin in self.state.remembered if pin.tree in trees]
        if not again:
            raise AdapterError("There is nothing to merge: set_lora has set no adapter for this target yet.")
        current = {loaded.info.digest for loaded in self.store.by_name.values()}
        gone = next((pin.nickname for pin in again if pin.digest not in current), None)
        if gone is not None:
            raise AdapterNotFound(
                f"The last set had the adapter {gone!r}, which was unloaded or loaded anew since; use set_lora."
            )
        scaled = [
            msgspec.structs.replace(pin, strength=check_strength(pin.strength * change.strength)) for pin in again
        ]
        others = [pin for pin in self.state.active if pin.tree not in trees]
        modes = {**self.state.modes, **dict.fromkeys(trees, _MERGE)}
        return self._staged(self.store.by_name, self.state.remembered, (*others, *scaled), modes)

    def _restore(self, change: RestoreLora) -> Staged:
        names: dict[str, Loaded] = {}
        reasons: dict[str, str] = {}
        for info in change.state.loaded:
            try:
                loaded = self.store.load(info.source, names)
            except AdapterError as error:
                reasons[info.digest] = f"Adapter {info.nickname!r}: {error.message}"
                continue
            if loaded.info.digest == info.digest:
                names[info.nickname] = loaded
            else:
                reasons[info.digest] = f"Adapter {info.nickname!r}: its file was changed since it was loaded."
        state = change.state
        found = {loaded.info.digest for loaded in names.values()}
        active = [pin for pin in state.active if pin.digest in found]
        staged = self._staged(names, state.remembered, active, state.modes)
        missing = {pin.digest: reasons.get(pin.digest, "") for pin in state.active if pin.digest not in found}
        if not missing:
            return staged
        # Requests must not silently get less than the set: they are told until somebody sets another.
        broken = msgspec.structs.replace(staged.state, active=state.active, merged={}, reasons={}, missing=missing)
        return Staged(names, broken, {}, changed=True)

    # --- parts ------------------------------------------------------------------------------------------------------

    def _with(self, sources: Iterable[AdapterSource]) -> dict[str, Loaded]:
        names = dict(self.store.by_name)
        for source in sources:
            names[source.nickname] = self.store.load(source, names)
        return names

    def _targeted(self, target: Target) -> tuple[str, ...]:
        if target == "all":
            return tuple(self.trees)
        if target not in self.trees:
            raise AdapterError(
                f"This model has no target {target!r}; it has {', '.join(['all', *self.trees])}.", param="target"
            )
        return (target,)

    def _staged(
        self,
        names: Mapping[str, Loaded],
        remembered: Sequence[Pin],
        active: Sequence[Pin],
        modes: Mapping[str, MergeMode],
    ) -> Staged:
        trees = dict.fromkeys(pin.tree for pin in active)
        choices = {tree: self._choice(tree, active, modes.get(tree, "auto"), names) for tree in trees}
        state = LoraState(
            loaded=tuple(loaded.info for loaded in names.values()),
            missing={d: why for d, why in self.state.missing.items() if any(pin.digest == d for pin in active)},
            remembered=tuple(remembered),
            active=tuple(active),
            modes=dict(modes),
            merged={tree: choice.merged for tree, choice in choices.items()},
            reasons={tree: choice.reason for tree, choice in choices.items()},
        )
        return Staged(names, state, choices, changed=state != self.state)

    def _choice(self, tree: str, active: Sequence[Pin], mode: MergeMode, names: Mapping[str, Loaded]) -> Choice:
        pins = [pin for pin in active if pin.tree == tree]
        same = pins == [pin for pin in self.state.active if pin.tree == tree] and self.state.modes.get(tree) == mode
        if same and tree in self.choices:
            return self.choices[tree]  # traffic may have moved it since
        found = {loaded.info.digest: loaded.adapter for loaded in names.values()}
        members: list[tuple[Adapter, float]] = [
            (found.get(pin.digest) or self.store.find(pin.digest), pin.strength) for pin in pins
        ]
        merge_only = next(filter(None, (adapter.merge_only(tree) for adapter, _ in members)), "")
        if mode == "dynamic" and merge_only:
            raise AdapterMergeOnly(
                f"merge_mode 'dynamic' is not possible here: an adapter exists only merged ({merge_only}). Use 'merge' "
                "or 'auto'.",
                param="merge_mode",
            )
        exact = self.trees[tree].weights.exact
        asked = mode == "auto" and not merge_only and exact
        return choose(mode, merge_only, rounding_loss(self.trees[tree], members) if asked else 0.0, exact)


_MERGE: MergeMode = "merge"
