"""The one normal form of every adapter file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from multimodal_gen.lora.updates import Update


class Entry(NamedTuple):
    """One update as a file spells it; made by a format."""

    tree: str | None  # the module tree that the file names; None: it does not say
    module: str  # path of the module inside its tree, in the file's spelling
    flat: bool  # the spelling has "_" for every "."
    parameter: str  # "weight" or "bias"
    update: Update
    source: str  # the file's own name of the module, for messages


class Parsed(NamedTuple):
    """A file's updates and what was not understood."""

    entries: list[Entry]
    format: str  # naming and kinds, such as `comfyui: lora`
    strange: dict[str, str]  # keys without a meaning here → why


@dataclass(frozen=True)
class Adapter:
    """Updates of a model's weights under the names of its checkpoint; filled by `bind`."""

    trees: Mapping[str, Mapping[str, tuple[Update, ...]]]  # tree → "layers.0.attention.to_q.weight" → in file order

    def updates(self) -> Iterator[Update]:
        """All of them."""
        return (update for tree in self.trees.values() for found in tree.values() for update in found)

    @property
    def rank(self) -> int:
        """The largest; 0 where nothing has one."""
        return max((update.rank for update in self.updates()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; those that several updates share count once."""
        held = {tensor.data_ptr(): tensor.nbytes for update in self.updates() for tensor in update.tensors}
        return sum(held.values())

    def merge_only(self, tree: str | None = None) -> str:
        """Why it cannot run unmerged (on one tree, or at all), or an empty string."""
        updates = self.updates() if tree is None else (u for found in self.trees.get(tree, {}).values() for u in found)
        return next((update.merge_only for update in updates if update.merge_only), "")
