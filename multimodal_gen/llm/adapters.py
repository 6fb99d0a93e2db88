"""The adapters of a language model: what is loaded, and what the rows of a batch compute with.

They run beside the weights, never merged into them, so that rows with different adapters and rows of the base model
share a forward. Changes are staged in any thread and committed between two steps, as those of pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal_gen.adapters import AdapterInfo, AdapterSource, Change, LoraState, RestoreLora, SwapLoras
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import AdapterError, AdapterMergeOnly, AdapterNotFound, AdapterUnavailable, did_you_mean
from multimodal_gen.llm.adapter_turns import ReadyAdapters
from multimodal_gen.lora.changes import Staged
from multimodal_gen.lora.overlay import make_overlay
from multimodal_gen.lora.store import AdapterStore, Limits, Loaded
from multimodal_gen.lora.tree import AdaptedTree
from multimodal_gen.nn.lowrank import Overlay, Routed, Routing
from multimodal_gen.nn.stacked import Stack, StackedRouting
from multimodal_gen.parallel.agreement import agree
from multimodal_gen.parallel.group import SOLO, Group

# Of a batch and of all adapters that are ready; beyond, each adapter's tokens are computed by themselves.
STACKED_TOKENS = 128
STACKED_RANKS = 512


@dataclass(frozen=True)
class TextStager:
    """The state before a change; `stage` reads files and raises the AdapterError family."""

    store: AdapterStore
    tree: AdaptedTree
    state: LoraState

    def stage(self, change: Change) -> Staged:
        """Work out a change without altering anything."""
        if isinstance(change, RestoreLora):
            return self._restore(change.state)
        assert isinstance(change, SwapLoras), f"{type(change).__name__} is for pictures"
        known = {info.nickname for info in self.state.loaded}
        for name in change.unload:
            if name not in known:
                raise AdapterNotFound(f"No adapter {name[:128]!a} is loaded.{did_you_mean(name[:128], known)}")
        names = {name: loaded for name, loaded in self.store.by_name.items() if name not in change.unload}
        for source in change.sources:
            names[source.nickname] = self._load(source, names)
        settled = {*change.unload, *(source.nickname for source in change.sources)}
        gone = [info for info in self.state.loaded if info.digest in self.state.missing]
        return self._staged(names, [info for info in gone if info.nickname not in settled], self.state.missing)

    def _restore(self, state: LoraState) -> Staged:
        names: dict[str, Loaded] = {}
        gone: dict[str, str] = {}
        for info in state.loaded:
            try:
                loaded = self._load(info.source, names)
            except AdapterError as error:
                gone[info.digest] = error.message
                continue
            if loaded.info.digest == info.digest:
                names[info.nickname] = loaded
            else:
                gone[info.digest] = "Its file was changed since it was loaded."
        return self._staged(names, [info for info in state.loaded if info.digest in gone], gone)

    def _load(self, source: AdapterSource, names: Mapping[str, Loaded]) -> Loaded:
        loaded = self.store.load(source, names)
        if loaded is not names.get(source.nickname):
            reason = loaded.adapter.merge_only()
            if reason:
                raise AdapterMergeOnly(
                    f"The adapter {source.nickname!r} exists only merged into the weights ({reason}). Those of a "
                    "language model run beside them, so that requests with different ones share a step: LoRA alone."
                )
            make_overlay(self.tree, [(loaded.adapter, 1.0)])  # whoever loads it is told of what overflows
        return loaded

    def _staged(self, names: Mapping[str, Loaded], gone: Sequence[AdapterInfo], why: Mapping[str, str]) -> Staged:
        found = tuple(loaded.info for loaded in names.values())
        state = LoraState(loaded=(*found, *gone), missing={info.digest: why[info.digest] for info in gone})
        return Staged(names, state, {}, changed=state != self.state)


class TextAdapters:
    """One per language model; all methods but `stager().stage` belong to the engine's thread."""

    def __init__(self, tree: AdaptedTree, config: EngineConfig, ranks: Group = SOLO) -> None:
        """`ranks` are all of the replica: each calls the same methods at the same point."""
        self.state = LoraState()
        self._tree = tree
        self._ranks = ranks
        count = config.max_loras if config.max_loaded_loras is None else config.max_loaded_loras
        limits = Limits(
            *(count, config.max_lora_mb, config.max_lora_rank),
            flag="--max-loaded-loras",
            cure="unload one (POST /v1/unload_lora_adapter)",
        )
        self._store = AdapterStore(limits, {tree.target.tree: tree.spellings})
        self._ready = ReadyAdapters(config.max_loras_per_batch)
        self._overlays: dict[str, Overlay | None] = {}  # digest → of those that are ready; None: it does nothing
        self._changed = False  # whether they are others than those in the stack
        self._stack: Stack | None = None  # of these, in their order; made when it is used
        self._places: dict[str, int] = {}  # digest → place in the stack

    # --- changes ------------------------------------------------------------------------------------------------------

    def stager(self) -> TextStager:
        """What works a change out, in any thread; no other change may be staged or committed before its own is."""
        return TextStager(self._store, self._tree, self.state)

    def commit(self, staged: Staged, *, weights_too: bool) -> None:
        """Make it so; there are no weights to follow."""
        self._store.replace(staged.names, (), keep_unloaded=False)
        self.state = staged.state
        self._forget_dropped()

    def lose(self, state: LoraState, why: str) -> None:
        """The adapters of the engine before this one cannot be had: requests are told instead of served by less."""
        missing = {info.digest: why for info in state.loaded}
        self.commit(Staged({}, LoraState(loaded=state.loaded, missing=missing), {}, changed=True), weights_too=False)

    def change(self, change: Change) -> None:
        """Make a change from beginning to end. Raises: the AdapterError family; nothing has changed then."""
        self.commit(self.stager().stage(change), weights_too=False)

    # --- requests -----------------------------------------------------------------------------------------------------

    def hold(self, digest: str | None) -> Callable[[], None]:
        """Keep the adapter of a request until the returned function is called, whatever is unloaded meanwhile.

        Raises: AdapterUnavailable, AdapterNotFound.
        """
        if digest is None:
            return lambda: None
        if digest in self.state.missing:
            raise AdapterUnavailable(
                f"The adapter could not be loaded again after the worker restarted. {self.state.missing[digest]} Load "
                "it anew."
            )
        self._store.find(digest)
        release = self._store.pin([digest])

        def let_go() -> None:
            release()
            self._forget_dropped()

        return let_go

    @property
    def held(self) -> int:
        """Uses of adapters that were not let go of."""
        return self._store.pinned

    @property
    def ready(self) -> Collection[str | None]:
        """Those that can compute at once, the base model among them, the least recently used first."""
        return self._ready.held

    @property
    def kept(self) -> int:
        """Adapters in memory, with a name or without."""
        return len(self._store)

    def routing(self, lengths: Sequence[int], adapters: Sequence[str | None]) -> Routed | None:
        """What the spans of a batch compute with; at most `max_loras_per_batch` different ones, None counted.

        Args:
            lengths: tokens of each span.
            adapters: digest of each span's adapter; equal ones side by side compute together.

        Raises: what allocating raised, on this rank or another.
        """
        for leaving in self._ready.bring(adapters):
            self._drop_overlay(leaving)
        overlays = {digest: self._overlay(digest) for digest in dict.fromkeys(adapters) if digest is not None}
        if not any(overlays.values()):
            return None
        stack = self._side_by_side() if sum(lengths) <= STACKED_TOKENS else None
        if stack is not None:
            return StackedRouting(stack, self._owners(lengths, adapters))
        return Routing.of(lengths, [None if digest is None else overlays[digest] for digest in adapters])

    def _side_by_side(self) -> Stack | None:
        """All that is ready, not only what these tokens need, so that it is made anew less often; None: too much."""
        if self._changed:
            ready = {digest: overlay for digest, overlay in self._overlays.items() if overlay is not None}
            ranks = sum(self._store.find(digest).rank for digest in ready)
            self._places = {digest: place for place, digest in enumerate(ready)}
            self._stack = Stack.of(tuple(ready.values())) if ranks <= STACKED_RANKS else None
            self._changed = False
        return self._stack

    def _owners(self, lengths: Sequence[int], adapters: Sequence[str | None]) -> Tensor:
        """int32 [T]: the place in the stack of each token's adapter; -1: the base model."""
        owners = torch.tensor([self._places.get(digest or "", -1) for digest in adapters], dtype=torch.int32)
        return owners.repeat_interleave(torch.tensor(lengths)).to(self._tree.device)

    def forget_overlays(self) -> None:
        """Let go of what is computed with; it is made again when it is asked for."""
        for digest in list(self._overlays):
            self._ready.drop(digest)
            self._drop_overlay(digest)

    @property
    def nbytes(self) -> int:
        """Bytes of what is computed with, besides the adapters themselves."""
        held = sum(overlay.nbytes for overlay in self._overlays.values() if overlay is not None)
        return held + (0 if self._stack is None else self._stack.nbytes)

    def _overlay(self, digest: str) -> Overlay | None:
        if digest not in self._overlays:
            overlay, failure = None, None
            try:
                overlay = make_overlay(self._tree, [(self._store.find(digest), 1.0)])
            except Exception as error:  # noqa: BLE001 - whatever it is, every rank has to learn of it
                failure = error
            agree(self._ranks, failure)
            self._overlays[digest] = overlay
            self._stack, self._changed = None, True
        return self._overlays[digest]

    def _forget_dropped(self) -> None:
        self._store.sweep()
        for digest in [digest for digest in self._overlays if digest not in self._store]:
            self._ready.drop(digest)
            self._drop_overlay(digest)

    def _drop_overlay(self, digest: str | None) -> None:
        if digest is not None and self._overlays.pop(digest, None) is not None:
            self._stack, self._changed = None, True
