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
        scaled = [
            msgspec.structs.replace(pin, strength=check_strength(pin.strength * change.strength)) for pin in again
        ]
        others = [pin for pin in self.state.active if pin.tree not in trees]
        modes = {**self.state.modes, **dict.fromkeys(trees, _MERGE)}
        return self._staged(self.store.by_name, self.state.remembered, (*others, *scaled), modes)

    def _restore(self, change: RestoreLora) -> Staged:
        names: dict[str, Loaded] = {}
        for info in change.state.loaded:
            loaded = names[info.nickname] = self.store.load(info.source, names)
            if loaded.info.digest != info.digest:
                raise AdapterError(
                    f"Adapter {info.nickname!r} cannot be brought back: its file was changed since it was loaded."
                )
        return self._staged(names, change.state.remembered, change.state.active, change.state.modes)

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
        current = {loaded.info.digest for loaded in names.values()}
        trees = dict.fromkeys(pin.tree for pin in active)
        choices = {tree: self._choice(tree, active, modes.get(tree, "auto"), names) for tree in trees}
        state = LoraState(
            loaded=tuple(loaded.info for loaded in names.values()),
            remembered=tuple(pin for pin in remembered if pin.digest in current),
            active=tuple(active),
            modes=dict(modes),
            merged={tree: choice.merged for tree, choice in choices.items()},
            reasons={tree: choice.reason for tree, choice in choices.items()},
        )
        return Staged(names, state, choices, changed=state != self.state)

    def _choice(self, tree: str, active: Sequence[Pin], mode: MergeMode, names: Mapping[str, Loaded]) -> Choice:
        pins = [pin for pin in active if pin.tree == tree]
        if pins == [pin for pin in self.state.active if pin.tree == tree] and self.state.modes.get(tree) == mode:
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
        loss = rounding_loss(self.trees[tree], members) if mode == "auto" and not merge_only else 0.0
        return choose(mode, merge_only, loss)


_MERGE: MergeMode = "merge"
