"""From a file's spelling to a model's weights: names resolved, fused layers split, every shape checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from multimodal_gen.errors import AdapterMismatch, did_you_mean
from multimodal_gen.lora.adapter import Adapter, Entry, Parsed
from multimodal_gen.lora.names import TreeLayout
from multimodal_gen.lora.updates import Update

SHOWN = 3  # examples in a message
BLOCK_ROWS = 512
MAX_SKIPPED = 100  # names that are told


@dataclass(frozen=True)
class Spellings:
    """All names of one tree's modules."""

    layout: TreeLayout

    @cached_property
    def dotted(self) -> dict[str, tuple[str, ...]]:
        """Spelling → canonical modules in row order."""
        return self.layout.modules()

    @cached_property
    def flat(self) -> dict[str, tuple[str, ...]]:
        """The same with "_" for every "."."""
        return {name.replace(".", "_"): parts for name, parts in self.dotted.items()}

    def find(self, entry: Entry) -> tuple[str, ...] | None:
        """The canonical modules that an entry means, or None."""
        return (self.flat if entry.flat else self.dotted).get(entry.module)


@dataclass(frozen=True)
class Bound:
    """An adapter on a model."""

    adapter: Adapter
    modules: dict[str, int]  # tree → modules that it changes
    skipped: tuple[str, ...]  # modules and keys of the file without a place in the model


def bind(parsed: Parsed, trees: Mapping[str, Spellings], *, allow_partial: bool, name: str) -> Bound:
    """Bind a file's updates to the trees of a model.

    Args:
        allow_partial: list what has no place instead of refusing the file; a wrong shape is an error all the same.
        name: of the file, for messages.

    Raises: AdapterMismatch.
    """
    found: dict[str, dict[str, list[tuple[str, Update]]]] = {}  # tree → parameter → (the file's module, update)
    lost: list[str] = []
    touched: dict[str, set[str]] = {}
    for entry in parsed.entries:
        homes = _homes(entry, trees)
        if not homes:
            lost.append(entry.source)
        for tree, canonical in homes.items():
            for module, update in _split(entry, canonical, trees[tree].layout, name):
                if module in trees[tree].layout.inert:  # trained, but nothing reads its result
                    continue
                found.setdefault(tree, {}).setdefault(f"{module}.{entry.parameter}", []).append((entry.source, update))
                touched.setdefault(tree, set()).add(module)
    lost = [*dict.fromkeys(lost), *parsed.strange]
    if not touched:
        raise AdapterMismatch(_nothing_fits(parsed, trees, lost, name))
    if lost and not allow_partial:
        raise AdapterMismatch(_does_not_fit(parsed, trees, lost, name))
    fixed = {
        tree: {key: _without_doubles(key, updates, name) for key, updates in keys.items()}
        for tree, keys in found.items()
    }
    return Bound(Adapter(fixed), {tree: len(modules) for tree, modules in touched.items()}, _told(lost))


def _told(lost: Sequence[str]) -> tuple[str, ...]:
    more = len(lost) - MAX_SKIPPED
    return (*lost[:MAX_SKIPPED], f"… and {more} more") if more > 0 else tuple(lost)


def _homes(entry: Entry, trees: Mapping[str, Spellings]) -> dict[str, tuple[str, ...]]:
    """Trees and canonical modules of an entry; a file that names no tree means the first that has the module.

    What is meant for a tree is meant for its twins too: which of them it changes is said when it is used.
    """
    named = trees if entry.tree is None else [entry.tree]
    first = next((tree for tree in named if tree in trees and trees[tree].find(entry) is not None), None)
    if first is None:
        return {}
    twins = [tree for tree, spelled in trees.items() if spelled.layout.target.twin_of == first]
    found = {tree: trees[tree].find(entry) for tree in (first, *twins)}
    return {tree: canonical for tree, canonical in found.items() if canonical is not None}


def _split(entry: Entry, canonical: Sequence[str], layout: TreeLayout, name: str) -> list[tuple[str, Update]]:
    """(canonical module, update) pairs: a fused layer's update is shared out by rows."""
    shapes = [layout.shapes.get(f"{module}.{entry.parameter}") for module in canonical]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        raise AdapterMismatch(f"{name}: module {entry.source[:120]!a} has no {entry.parameter} in this model.")
    wanted = (sum(shape[0] for shape in known), *known[0][1:])
    if entry.update.shape != wanted:
        raise AdapterMismatch(
            f"{name}: module {entry.source[:120]!a} is for a weight of shape {list(entry.update.shape)}, this "
            f"model's has {list(wanted)}. The adapter was made for another model."
        )
    if len(canonical) == 1:
        return [(canonical[0], entry.update)]
    pairs, start = [], 0
    for module, shape in zip(canonical, known, strict=True):
        pairs.append((module, entry.update.take(slice(start, start + shape[0]))))
        start += shape[0]
    return pairs


def _without_doubles(key: str, updates: Sequence[tuple[str, Update]], name: str) -> tuple[Update, ...]:
    """Some programs store a fused layer and its parts, which say the same twice; what differs is refused."""
    source, first = updates[0]
    for other, update in updates[1:]:
        if other == source or not _equal(first, update):
            raise AdapterMismatch(f"{name}: modules {source!r} and {other!r} both change {key}, each in its own way.")
    return (first,)


def _equal(one: Update, other: Update) -> bool:
    """Whether two updates do the same, within rounding."""
    cpu = torch.device("cpu")
    pair = one.on(cpu), other.on(cpu)
    for start in range(0, one.shape[0], BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, one.shape[0]))
        base = torch.zeros(rows.stop - start, *one.shape[1:])
        a, b = base.clone(), base.clone()
        for total, update in zip((a, b), pair, strict=True):
            update.add_(total, base, rows, 1.0)
        if not torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max())):
            return False
    return True


def _nothing_fits(parsed: Parsed, trees: Mapping[str, Spellings], lost: Sequence[str], name: str) -> str:
    if not parsed.entries:
        return f"{name} holds no adapter: {_examples(parsed, lost)}."
    return f"{name} fits no module of this model ({', '.join(trees)}): {_examples(parsed, lost)}."


def _does_not_fit(parsed: Parsed, trees: Mapping[str, Spellings], lost: Sequence[str], name: str) -> str:
    count = len({entry.source for entry in parsed.entries}) + len(parsed.strange)
    known = {spelling for tree in trees.values() for spelling in tree.dotted}
    first = next((entry for entry in parsed.entries if entry.source == lost[0]), None)
    hint = did_you_mean(first.module, known) if first is not None and not first.flat else ""
    return (
        f"{name}: {len(lost)} of {count} modules have no place in this model: {_examples(parsed, lost)}.{hint} "
        "Set allow_partial to load the rest."
    )


def _examples(parsed: Parsed, lost: Sequence[str]) -> str:
    shown = [f"{key[:120]!a}" + (f" ({parsed.strange[key]})" if key in parsed.strange else "") for key in lost[:SHOWN]]
    return ", ".join(shown) + (", …" if len(lost) > SHOWN else "")
