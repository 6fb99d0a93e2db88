"""Adapters merged into the weights: W = round(W0 + Σ s_i · Δ_i), summed in list order in float32, rounded once.

W0 comes from the checkpoint's files each time, never from the model: unmerging is exact, and no copy of the model is
kept. The tree is written layer by layer; when that fails half-way, on any rank, the set before is written again.

Ranks that share a weight merge their piece of every update into their piece of W0. What needs whole rows (the norms of
DoRA) where ranks share the columns is computed from whole rows of W0 and cut afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from multimodal_gen.errors import AdapterError
from multimodal_gen.lora.tree import AdaptedTree, Members
from multimodal_gen.lora.updates import LowRank, Update
from multimodal_gen.nn.slots import Cut
from multimodal_gen.parallel.agreement import agree
from multimodal_gen.parallel.group import SOLO, Group

CHUNK_BYTES = 8 << 20  # float32 rows that are summed at a time: they stay in the cache, and occupy all cores
SAMPLED_WEIGHTS = 12
SAMPLED_ROWS = 64


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
        wanted: dict[str, list[tuple[Update, float]]],
        names: Iterable[str],
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        cuts = {name: self.tree.place(name).cut for name in names}
        whole = {
            name
            for name, cut in cuts.items()
            if cut is not None and cut.dim > 0 and any(update.reads_base for update, _ in wanted.get(name, ()))
        }
        for name, pristine in self.tree.pristine(sorted(names), whole):
            view, updates, cut = self.tree.place(name).view(), wanted.get(name, ()), cuts[name]
            if cut is None:
                write(view, pristine, updates)
            elif name in whole:
                write(view, pristine, updates, cut.piece(pristine.shape[1]))
            else:
                write(view, pristine, [(piece(update, cut), strength) for update, strength in updates])
            on_layer()


def _failure(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - whatever it is, every rank has to learn of it
        return error
    return None


def piece(update: Update, cut: Cut) -> Update:
    """What a rank's piece of a weight gets of an update."""
    if cut.dim == 0:
        return update.take(cut.piece(update.shape[0]))
    return update.columns(cut.piece(update.shape[1]))


def write(
    view: Tensor, pristine: Tensor, updates: Sequence[tuple[Update, float]], columns: slice | None = None
) -> None:
    """view = round(pristine + Σ strength · Δ), or these columns of it, a block of rows at a time.

    Raises: AdapterError for what overflows.
    """
    if not updates:
        view.copy_(pristine)
        return
    ready = stacked([(update.on(view.device), strength) for update, strength in updates])
    row_bytes = 4 * pristine[:1].numel()
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, len(pristine), step):
        rows = slice(start, min(start + step, len(pristine)))
        total = _sum(pristine[rows].to(view.device, torch.float32, copy=True), ready, rows)
        view[rows].copy_(total if columns is None else total[:, columns])
        if not view[rows].sum(dtype=torch.float32).isfinite():
            raise AdapterError(
                "The adapters overflow the model's numbers at these strengths; lower them, or the alpha."
            )


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
        dtype = tree.place(name).view().dtype
        base = pristine[rows].float()
        ready = [(update.on(base.device), strength) for update, strength in sample[name]]
        delta = _sum(base.clone(), ready, rows) - base
        kept = (base + delta).to(dtype).float() - base.to(dtype).float()
        lost += float((kept - delta).square().sum())
        whole += float(delta.square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0
