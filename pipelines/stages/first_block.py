"""A forward in two halves: all rows run the first block, and those whose step is extrapolated leave (decision 036).

The first block adds something to the tokens of a sequence. How much that has changed since the row was last computed to
the end says how much the rest would have changed (ParaAttention's first-block cache; `stages.step_cache` decides). Of
long sequences evenly spread tokens are looked at, at most `MOST_TOKENS` of each branch: a row remembers them.

Both branches of guidance are looked at together, whoever computes them, so that every rank decides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal_gen.parallel.branches import BranchShare, Pair
from multimodal_gen.parallel.sequence import TokenShards
from multimodal_gen.pipelines.contract import Row
from multimodal_gen.pipelines.stages.step_cache import Choice, similar

MOST_TOKENS = 256


@dataclass(frozen=True)
class Begun:
    """One packed sequence after the first block."""

    x: Tensor  # [l, D], on every rank
    added: Tensor  # float32 [s, D], on every rank: what the block has added to the tokens that are looked at


@dataclass(frozen=True)
class Halves:
    """A family's forward over branches of a batch."""

    begin: Callable[[list[Pair]], dict[Pair, Begun]]  # as far as the first block
    finish: Callable[[dict[Pair, Begun]], dict[Pair, Tensor]]  # the rest, for those that are left


def looked_at(tokens: int) -> int:
    """How many of a sequence's tokens are looked at."""
    return len(range(0, tokens, _stride(tokens)))


def run_first(
    x: Tensor, shards: TokenShards, lengths: Sequence[int], counting: Sequence[int], block: Callable[[Tensor], Tensor]
) -> list[Begun]:
    """Run the first block over this rank's tokens x [n, D].

    Args:
        lengths: of the packed sequences.
        counting: how many tokens at the beginning of each belong to the picture or video; the others are not looked at.
    """
    places, start = [], 0
    for length, tokens in zip(lengths, counting, strict=True):
        places.append(torch.arange(start, start + tokens, _stride(tokens), device=x.device))
        start += length
    positions = torch.cat(places)
    before = shards.pick(x, positions).float()
    x = block(x)
    added = shards.pick(x, positions).float() - before
    counts = [len(place) for place in places]
    return [Begun(*both) for both in zip(shards.gather(x).split(list(lengths)), added.split(counts), strict=True)]


def leave_early(
    rows: Sequence[Row],
    choices: Sequence[Choice],
    share: BranchShare,
    halves: Halves,
    shapes: Sequence[torch.Size],
    looked: Sequence[torch.Size],
    like: Tensor,
) -> tuple[dict[Pair, Tensor], list[Tensor]]:
    """Both halves of a forward over these rows.

    Args:
        choices: what is to become of each row: "ask" or "compute".
        shapes, like: of the outputs, as `BranchShare.exchange` takes them.
        looked: shape of what is looked at in each branch of each row, [s, D].

    Returns: the outputs of the rows that ran to the end, and what the first block added to each row [branches, s, D].
    """
    begun = share.compute(halves.begin)
    added = share.exchange({pair: each.added for pair, each in begun.items()}, looked, like.float())
    heads = [torch.stack([added[row, branch] for branch in range(count)]) for row, count in enumerate(share.counts)]
    asked = [index for index, choice in enumerate(choices) if choice == "ask"]
    verdicts = similar([rows[index] for index in asked], [heads[index] for index in asked])
    staying = share.without(index for index, leaves in zip(asked, verdicts, strict=True) if leaves)
    outputs = staying.compute(lambda mine: halves.finish({pair: begun[pair] for pair in mine}))
    return staying.exchange(outputs, shapes, like), heads


def _stride(tokens: int) -> int:
    return -(-tokens // MOST_TOKENS)
