"""Choosing tokens at random: temperature, top-k, top-p and min-p as one limit for each row, then one number in [0, 1)
that points into what is left.

Limits are weights, not ranks: candidates that are equally likely stay or go together, so the order in which a sort
leaves them, and with it the other rows of the batch, decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.llm.sampling import SamplingRow

# Candidates that are sorted first, and second. Nearly always they hold the top-p set; else all are sorted.
FEW, MORE = 256, 4096
# Sums over a vocabulary are sums of sums over so many neighbours. Usual vocabularies are multiples of it.
BLOCK = 128


def choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """int64 [R]: a token for each row of float32 [R, V], none of whose maxima is infinite or no number."""
    weights = logits / _column([row.sampling.temperature for row in rows], logits)
    weights -= weights.amax(-1, keepdim=True)
    weights.exp_()
    _drop(weights, limits(weights, rows))
    return pick(weights, torch.tensor([row.uniform() for row in rows], dtype=torch.float64).to(logits.device))


def _column(values: list[float], like: Tensor) -> Tensor:
    """float32 [R, 1] on the same device."""
    return torch.tensor(values, dtype=torch.float32).to(like.device)[:, None]


def limits(weights: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """float32 [R]: what a candidate's weight must reach, where the best one of each row has weight 1."""
    vocabulary = weights.shape[1]
    least = torch.tensor([row.sampling.min_p for row in rows], dtype=torch.float32).to(weights.device)
    ranked = [at for at, row in enumerate(rows) if 0 < row.sampling.top_k < vocabulary or row.sampling.top_p < 1.0]
    few = max([FEW, *(2 * rows[at].sampling.top_k for at in ranked)])
    for width in (few, max(few, MORE), vocabulary):
        if ranked:
            found, enough = _by_rank(weights, ranked, [rows[at] for at in ranked], min(width, vocabulary))
            at = torch.tensor(ranked).to(weights.device)
            least[at] = torch.maximum(least[at], found)
            ranked = [at for at, known in zip(ranked, enough.tolist(), strict=True) if not known]
    return least


def _by_rank(weights: Tensor, places: list[int], rows: list[SamplingRow], width: int) -> tuple[Tensor, Tensor]:
    """(limits [R] of top-k and top-p, whether `width` candidates were enough to know them; 0 where not)."""
    vocabulary, device = weights.shape[1], weights.device
    best = _largest(weights, places, width)
    sums = best.double().cumsum(-1)
    k = torch.tensor([row.sampling.top_k if 0 < row.sampling.top_k < vocabulary else 0 for row in rows]).to(device)
    kth = torch.where(k > 0, best.gather(1, (k.clamp(min=1) - 1)[:, None])[:, 0], 0.0)
    kept = (best >= kth[:, None]).sum(-1)
    inside = sums.gather(1, (kept - 1)[:, None])[:, 0]
    chosen = weights if len(places) == len(weights) else weights[places]
    total = torch.where(k > 0, inside, block_sums(chosen)[1][:, -1])
    top_p = torch.tensor([row.sampling.top_p for row in rows], dtype=torch.float64).to(device)
    rank = (sums < (top_p * total)[:, None]).sum(-1)
    last = best.gather(1, rank.clamp(max=width - 1)[:, None])[:, 0]
    limited = top_p < 1.0
    found = torch.where(limited, torch.maximum(kth, last), kth)
    # Candidates as likely as the k-th may go on behind those that were sorted: then the sum over all is not known.
    enough = ~limited | ((rank < width) & ((k == 0) | (kept < width)))
    if width == vocabulary:
        enough = torch.ones_like(enough)
    return torch.where(enough, found, 0.0), enough


def _largest(weights: Tensor, places: list[int], width: int) -> Tensor:
    """float32 [len(places), width]: the largest weights of some rows, in descending order."""
    if weights.device.type != "cpu":
        return weights[places].topk(width, dim=-1).values
    # numpy sorts floats several times as fast as torch does.
    best = np.empty((len(places), width), np.float32)
    for to, at in enumerate(places):
        row = weights[at].numpy()
        if width < len(row):
            row = np.partition(row, len(row) - width)[-width:]
        best[to] = np.sort(row)[::-1]
    return torch.from_numpy(best)


def _drop(weights: Tensor, least: Tensor) -> None:
    """Set weights [R, V] below least [R] to 0."""
    if weights.device.type != "cpu":
        weights.masked_fill_(weights < least[:, None], 0.0)
        return
    # A threshold that is one number is many times as fast as a comparison with a column.
    below = torch.nextafter(least, torch.tensor(-torch.inf)).tolist()
    for at, (limit, under) in enumerate(zip(least.tolist(), below, strict=True)):
        if limit > 0:
            torch.threshold_(weights[at], under, 0.0)


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
