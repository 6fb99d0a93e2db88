"""Choosing tokens at random: temperature, top-k, top-p and min-p as one threshold for each row, then one number in
[0, 1) that points into what is left.

Thresholds are values of logits, not ranks: candidates that are equally likely stay or go together, so the order in
which a sort leaves them, and with it the other rows of the batch, decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from multimodal_gen.llm.sampling import SamplingRow

# Candidates that are sorted first. Nearly always they hold the top-p set; where they do not, all are sorted.
FEW = 256
# Sums over a vocabulary are sums of sums over so many neighbours. Usual vocabularies are multiples of it.
BLOCK = 128


def choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """int64 [R]: a token for each row of float32 [R, V], none of whose maxima is infinite or no number."""
    scores = logits / column([row.sampling.temperature for row in rows], logits)
    scores -= scores.amax(-1, keepdim=True)
    weights = scores.exp()
    limits = thresholds(scores, weights, rows)
    if limits is not None:
        weights.masked_fill_(scores < limits[:, None], 0.0)
    return pick(weights, torch.tensor([row.uniform() for row in rows], dtype=torch.float64).to(logits.device))


def column(values: list[float], like: Tensor) -> Tensor:
    """float32 [R, 1] on the same device."""
    return torch.tensor(values, dtype=torch.float32).to(like.device)[:, None]


def thresholds(scores: Tensor, weights: Tensor, rows: Sequence[SamplingRow]) -> Tensor | None:
    """float32 [R]: what a candidate's score must reach; None where all may stay. The best score of each row is 0, and
    weights are exp(scores)."""
    vocabulary = scores.shape[1]
    sorts = [at for at, row in enumerate(rows) if 0 < row.sampling.top_k < vocabulary or row.sampling.top_p < 1.0]
    if not sorts and not any(row.sampling.min_p for row in rows):
        return None
    limits = torch.tensor([math.log(row.sampling.min_p) if row.sampling.min_p else -torch.inf for row in rows])
    limits = limits.to(scores.device)
    few = min(max([FEW, *(2 * rows[at].sampling.top_k for at in sorts)]), vocabulary)
    for width in (few, vocabulary):
        if not sorts:
            break
        at = torch.tensor(sorts).to(scores.device)
        whole = len(sorts) == len(rows)
        found, enough = _by_rank(
            scores if whole else scores[at], weights if whole else weights[at], [rows[i] for i in sorts], width
        )
        limits[at] = torch.maximum(limits[at], found)
        sorts = [i for i, good in zip(sorts, enough.tolist(), strict=True) if not good]
    return limits


def _by_rank(scores: Tensor, weights: Tensor, rows: list[SamplingRow], width: int) -> tuple[Tensor, Tensor]:
    """(thresholds [R] of top-k and top-p, whether `width` candidates were enough to know them)."""
    vocabulary = scores.shape[1]
    best = scores.topk(width, dim=-1).values
    ks = [row.sampling.top_k if 0 < row.sampling.top_k < vocabulary else 0 for row in rows]
    k = torch.tensor(ks).to(scores.device)
    kth = best.gather(1, (k.clamp(min=1) - 1)[:, None])[:, 0]
    kth = torch.where(k > 0, kth, -torch.inf)
    sums = best.double().exp().cumsum(-1)
    kept = (best >= kth[:, None]).sum(-1)
    inside = sums.gather(1, (kept - 1)[:, None])[:, 0]
    total = torch.where(k > 0, inside, block_sums(weights)[1][:, -1])
    top_p = torch.tensor([row.sampling.top_p for row in rows], dtype=torch.float64).to(scores.device)
    wanted = top_p * total
    rank = (sums < wanted[:, None]).sum(-1)
    last = best.gather(1, rank.clamp(max=width - 1)[:, None])[:, 0]
    limited = top_p < 1.0
    found = torch.where(limited, torch.maximum(kth, last), kth)
    # Ties at the end of what was sorted may go on behind it: then neither the k-th value's set nor its sum is known.
    known_k = (k == 0) | (kept < width) | ~limited
    enough = known_k & (~limited | (rank < width))
    if width == vocabulary:
        enough = torch.ones_like(enough)
    return torch.where(enough, found, -torch.inf), enough


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """int64 [R]: the token at which the running sum of weights [R, V] passes uniform [R] of the whole. A token of no
    weight is never picked."""
    by_block, sums = block_sums(weights)
    block, rest = _passes(sums, uniform * sums[:, -1])
    inner = by_block[torch.arange(len(weights), device=weights.device), block].double().cumsum(-1)
    place, _ = _passes(inner, rest)
    return block * BLOCK + place


def block_sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [R, V] as [R, blocks, BLOCK], float64 [R, blocks] sums up to the end of each block).

    A row's sum has the same bits in every batch, which `sum` over a whole row does not: a single one is shared out
    among threads.
    """
    count, vocabulary = weights.shape
    blocks = -(-vocabulary // BLOCK)
    if vocabulary % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, blocks * BLOCK - vocabulary))
    by_block = weights.view(count, blocks, BLOCK)
    return by_block, by_block.sum(-1).double().cumsum(-1)


def _passes(sums: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(first place in each row of running sums that is above its target, target less the sum before that place). Sums
    over blocks and within one may differ in their last bits: the target is kept below the end."""
    target = torch.minimum(target, sums[:, -1] * (1 - 2.0**-50))
    place = torch.searchsorted(sums, target[:, None], right=True)
    before = torch.where(place > 0, sums.gather(1, (place - 1).clamp(min=0)), 0.0)
    return place[:, 0], target - before[:, 0]
