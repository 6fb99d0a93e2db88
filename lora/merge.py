"""Adapters merged into the weights: W = round(W0 + Σ s_i · Δ_i), summed in list order in float32, rounded once.

W0 comes from the checkpoint's files each time, never from the model: unmerging is exact, and no copy of the model is
kept. The tree is written layer by layer; when that fails half-way, on any rank, the set before is written again.

Ranks that share a weight merge their piece of every update into their piece of W0. What needs whole rows (the norms of
DoRA) where ranks share the columns is computed from whole rows of W0 and cut afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from multimodal_gen.errors import AdapterError
from multimodal_gen.lora.tree import AdaptedTree, Members
from multimodal_gen.lora.updates import LowRank, Update
from multimodal_gen.nn.slots import Cut
from multimodal_gen.parallel.agreement import agree
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.weights.loading import Change

SAMPLED_WEIGHTS = 12
SAMPLED_ROWS = 64
SAFE = 0.25  # of the largest number of a dtype: updates below it do not overflow

Addends = Sequence[tuple[Update, float]]  # updates of one weight with their strengths, in list order


class MergedTree:
    """The weights of one tree and what is merged into them."""

    def __init__(self, tree: AdaptedTree, on_layer: Callable[[], None] = lambda: None, ranks: Group = SOLO) -> None:
        """
        Args:
            on_layer: called after every weight that was written; tests fail there.
            ranks: all that must hold the same set, whatever they share; each calls `set` at the same point.
        """
        self.tree = tree
        self.broken = False  # set when neither the new set nor the one before could be written
        self.members: Members = ()  # what the weights hold
        self._touched: frozenset[str] = frozenset()
        self._on_layer = on_layer
        self._ranks = ranks

    @torch.inference_mode()
    def set(self, members: Members) -> None:
        """Bring the weights to `members`; () is the base model.

        Weights that are not in memory now are merged when they come.

        Raises: what reading or allocating raised here or on another rank; the weights are then as before, or `broken`
        is set.
        """
        # Before anything is written, so that nothing has to be written back.
        agree(self._ranks, _failure(self.tree.check))
        before = self.members
        wanted = self.tree.gather(members)
        names = self._touched | wanted.keys()
        try:
            agree(self._ranks, _failure(lambda: self._write(wanted, names, self._on_layer)))
        except BaseException:
            self.broken = True
            old = self.tree.gather(before)
            self._write(old, names | old.keys())
            self.broken = False
            raise
        self.members, self._touched = tuple(members), frozenset(wanted)

    def _write(
        self,
        wanted: Mapping[str, Addends],
        names: Set[str],
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        doubtful = {name for name, updates in wanted.items() if self._may_overflow(name, updates)}
        recipes = {
            name: _recipe(updates, self.tree.place(name).cut, name in doubtful) for name, updates in wanted.items()
        }
        self.tree.rewrite(recipes, names, on_layer, doubtful)

    def _may_overflow(self, name: str, updates: Addends) -> bool:
        """False is certain, but for weights that are near the end of their numbers themselves."""
        largest = sum(abs(strength) * update.bound for update, strength in updates)
        return not largest < SAFE * torch.finfo(self.tree.place(name).tensor.dtype).max


def _failure(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - whatever it is, every rank has to learn of it
        return error
    return None


def _recipe(updates: Addends, cut: Cut | None, doubtful: bool) -> Merge:
    """For a weight, or the piece of it that a rank holds."""
    if cut is None:
        return Merge(tuple(updates), doubtful=doubtful)
    if cut.dim > 0 and any(update.reads_base for update, _ in updates):
        return Merge(tuple(updates), cut, doubtful)
    return Merge(tuple((piece(update, cut), strength) for update, strength in updates), doubtful=doubtful)


def piece(update: Update, cut: Cut) -> Update:
    """What a rank's piece of a weight gets of an update."""
    if cut.dim == 0:
        return update.take(cut.piece(update.shape[0]))
    return update.columns(cut.piece(update.shape[1]))


@dataclass(frozen=True)
class Merge:
    """The recipe round(pristine + Σ strength · Δ) of one weight."""

    updates: Addends
    columns: Cut | None = None  # which columns of the result are held, where the updates are for whole rows
    doubtful: bool = True  # whether the sums may overflow, so that each is looked at

    @property
    def whole(self) -> bool:
        """Whether it reads whole rows where only some columns of them are held."""
        return self.columns is not None

    def begin(self, device: torch.device, dtype: torch.dtype) -> Change:
        """What is returned raises AdapterError for sums that overflow."""
        ready = stacked([(update.on(device), strength) for update, strength in self.updates])

        def change(rows: slice, pristine: Tensor) -> Tensor:
            total = _sum(pristine.to(device, torch.float32, copy=True), ready, rows)
            merged = (total if self.columns is None else total[:, self.columns.piece(total.shape[1])]).to(dtype)
            if self.doubtful and not merged.sum(dtype=torch.float32).isfinite():
                raise AdapterError(
                    "The adapters overflow the model's numbers at these strengths; lower them, or the alpha."
                )
            return merged

        return change


def stacked(updates: Sequence[tuple[Update, float]]) -> list[tuple[Update, float]]:
    """The same with neighbouring low-rank updates as one wider one, their strengths inside: one product for all."""
    found: list[tuple[Update, float]] = []
    for is_low_rank, group in groupby(updates, key=lambda pair: isinstance(pair[0], LowRank)):
        members = list(group)
        if is_low_rank and len(members) > 1:
            pairs = [(update, strength) for update, strength in members if isinstance(update, LowRank)]
            down = torch.cat([update.down for update, _ in pairs])
            up = torch.cat([update.up * (strength * update.scale) for update, strength in pairs], dim=1)
            members = [(LowRank(down, up, 1.0), 1.0)]
        found += members
    return found


def _sum(base: Tensor, updates: Sequence[tuple[Update, float]], rows: slice) -> Tensor:
    """base + Σ; base may be overwritten."""
    total = base.clone() if any(update.reads_base for update, _ in updates) else base
    for update, strength in updates:
        update.add_(total, base, rows, strength)
    return total


@torch.inference_mode()
def rounding_loss(tree: AdaptedTree, members: Members) -> float:
    """‖round(W) - round(W0) - Δ‖ / ‖Δ‖ over a sample of weights: the share of the update that merging would lose.

    Near 0 in float32; 1 means that the merged model is the base model. Sampled evenly over the tree, some rows each,
    whole ones: every rank comes to the same number.
    """
    wanted = sorted(tree.gather(members).items())
    sample = dict(wanted[:: max(1, len(wanted) // SAMPLED_WEIGHTS)])
    lost = whole = 0.0
    for name, pristine in tree.pristine(sample, sample):
        rows = slice(0, min(SAMPLED_ROWS, len(pristine)))
        dtype = tree.place(name).tensor.dtype
        base = pristine[rows].float()
        ready = [(update.on(base.device), strength) for update, strength in sample[name]]
        delta = _sum(base.clone(), ready, rows) - base
        kept = (base + delta).to(dtype).float() - base.to(dtype).float()
        lost += float((kept - delta).square().sum())
        whole += float(delta.square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0
