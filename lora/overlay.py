"""Unmerged adapters: an ordered list becomes one wider low-rank update per layer (ranks stacked)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from multimodal_gen.errors import AdapterError, AdapterMergeOnly
from multimodal_gen.lora.merge import piece
from multimodal_gen.lora.tree import Gathered, Members
from multimodal_gen.lora.updates import LowRank
from multimodal_gen.nn.linear import FusedLinear, Linear
from multimodal_gen.nn.lowrank import Overlay, Piece, Update
from multimodal_gen.nn.precision import compute_dtype
from multimodal_gen.nn.slots import Extent
from multimodal_gen.weights.loading import Place

Addends = list[tuple[LowRank, float]]  # updates of one weight with their strengths, in list order


class Adaptable(Protocol):
    """A module tree, as far as adapters beside its weights need it."""

    def place(self, name: str) -> Place:
        """Where the weight of a canonical name lives."""

    def gather(self, members: Members) -> Gathered:
        """What `members` do to this tree."""


def make_overlay(tree: Adaptable, members: Members) -> Overlay | None:
    """What `members` do to the tree, unmerged; None where they do nothing.

    Raises: AdapterMergeOnly for updates that are no low-rank product of a linear layer.
    """
    layers = _collect(tree, members)
    return Overlay({layer: _stack(layer, blocks) for layer, blocks in layers.items()}) if layers else None


def _collect(tree: Adaptable, members: Members) -> dict[nn.Module, list[tuple[Extent, Addends]]]:
    layers: dict[nn.Module, list[tuple[Extent, Addends]]] = {}
    for name, updates in tree.gather(members).items():
        place = tree.place(name)
        reason = next((update.merge_only for update, _ in updates if update.merge_only), "")
        if not reason and (not isinstance(place.layer, (Linear, FusedLinear, nn.Linear)) or place.name != "weight"):
            reason = f"{name} is no weight of a linear layer"
        if reason:
            raise merge_only_error(reason)
        # Ranks that share the outputs have some rows of B, those that share the inputs some columns of A.
        mine = updates if place.cut is None else [(piece(update, place.cut), strength) for update, strength in updates]
        low_rank = [(update, strength) for update, strength in mine if isinstance(update, LowRank)]
        layers.setdefault(place.layer, []).append((_extent(place.layer, place.part), low_rank))
    return layers


def merge_only_error(reason: str) -> AdapterMergeOnly:
    """For a list that cannot run beside the weights."""
    return AdapterMergeOnly(
        f"An adapter of this list exists only merged into the weights ({reason}), so it cannot be used in a request's "
        "own list or in merge_mode 'dynamic'; activate it with set_lora and merge_mode 'merge'."
    )


def _extent(layer: nn.Module, part: str | None) -> Extent:
    if isinstance(layer, (Linear, FusedLinear)):
        return layer.extent(part)
    assert isinstance(layer, nn.Linear)
    return Extent(slice(0, layer.out_features), slice(0, layer.in_features))


def _stack(layer: nn.Module, blocks: Sequence[tuple[Extent, Addends]]) -> Update:
    weight = layer.get_parameter("weight")
    dtype = compute_dtype(weight.dtype, weight.device)
    ranks: dict[tuple[int, ...], slice] = {}  # factors that blocks share (one A for q, k and v) are multiplied once
    downs: list[Tensor] = []
    pieces = []
    for extent, addends in blocks:
        shared = tuple(update.down.data_ptr() for update, _ in addends)
        if shared not in ranks:
            start = sum(down.shape[0] for down in downs)
            downs += [update.down for update, _ in addends]
            ranks[shared] = slice(start, sum(down.shape[0] for down in downs))
        up = torch.cat([update.up.float() * (strength * update.scale) for update, strength in addends], dim=1)
        narrow = up.T.to(weight.device, dtype).contiguous()
        if not narrow.sum(dtype=torch.float32).isfinite():
            raise AdapterError(
                "The adapters overflow the model's numbers at these strengths; lower them, or the alpha."
            )
        pieces.append(Piece(extent.rows, ranks[shared], narrow))
    total = sum(down.shape[0] for down in downs)
    down = torch.zeros(weight.shape[1], total, dtype=dtype, device=weight.device)  # zero for padded inputs
    columns = blocks[0][0].columns
    down[columns] = torch.cat([d.float() for d in downs]).T.to(weight.device, dtype)
    return Update(down, tuple(pieces))
