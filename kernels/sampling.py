"""Tokens out of logits, a row each: the best one, or one at random under temperature, top-k, top-p and min-p.

All limits come to one: what a candidate's weight must reach, where the best one has weight 1. They are weights, not
ranks: candidates that are equally likely stay or go together, so the order in which a sort leaves them, and with it the
other rows of the batch, decides nothing. Then one number in [0, 1) points into what is left, so a row needs one random
number, not one per candidate as with Gumbel noise, and says the same again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.kernels import native

# Candidates that the reference sorts first, and second. Nearly always they hold the top-p set; else all are sorted.
FEW, MORE = 256, 4096
# Sums over a vocabulary are sums of sums over so many neighbours. Usual vocabularies are multiples of it.
BLOCK = 128

_sampling = native.Function("sampling", "ppppppppiiii", (torch.float32,))
_best_logits = native.Function("best_logits", "pppii", (torch.float32,))


@dataclass(frozen=True)
class Wishes:
    """Of R rows, on the device of their logits."""

    temperature: Tensor  # float32 [R], above 0
    top_k: Tensor  # int32 [R]; 0: all
    top_p: Tensor  # float64 [R]; 1: all
    min_p: Tensor  # float32 [R]
    uniform: Tensor  # float64 [R] in [0, 1): what decides


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(largest [R], its id int64 [R], the smallest where several are) of float32 [R, V]; NaN where a logit is none."""
    compute = _best_logits.of(logits)
    if compute is None or not logits.is_contiguous():
        ids = logits.argmax(-1)
        return logits.gather(1, ids[:, None])[:, 0], ids
    values = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    compute(logits.data_ptr(), values.data_ptr(), ids.data_ptr(), *logits.shape)
    return values, ids


def sample(logits: Tensor, wishes: Wishes) -> Tensor:
    """int64 [R]: a token for each row of float32 [R, V], none of whose maxima is infinite or no number."""
    _check(logits, wishes)
    if native.by_triton(logits):
        from multimodal_gen.kernels.gpu import sampling

        return sampling.sample(logits, wishes)
    compute = _sampling.of(logits)
    if compute is None:
        return reference(logits, wishes)
    logits, ids = logits.contiguous(), torch.empty(len(logits), dtype=torch.long, device=logits.device)
    padded = -(-logits.shape[1] // BLOCK) * BLOCK
    memory = torch.empty(torch.get_num_threads(), 2, padded, dtype=torch.float32, device=logits.device)
    asked = (wishes.temperature, wishes.top_k, wishes.top_p, wishes.min_p, wishes.uniform, ids, memory)
    compute(logits.data_ptr(), *(tensor.data_ptr() for tensor in asked), len(memory), *logits.shape, padded)
    return ids


def _check(logits: Tensor, wishes: Wishes) -> None:
    assert logits.dim() == 2, logits.shape
    assert logits.dtype == torch.float32, logits.dtype
    kinds = (
        ("temperature", wishes.temperature, torch.float32),
        ("top_k", wishes.top_k, torch.int32),
        ("top_p", wishes.top_p, torch.float64),
        ("min_p", wishes.min_p, torch.float32),
        ("uniform", wishes.uniform, torch.float64),
    )
    for name, wish, kind in kinds:
        assert wish.dtype == kind, f"{name} is {wish.dtype}, not {kind}"
        assert wish.shape == logits.shape[:1], f"{name} is of {tuple(wish.shape)} rows, logits of {len(logits)}"
        assert wish.is_contiguous(), name
        assert wish.device == logits.device, (name, wish.device, logits.device)


# --- in torch ---------------------------------------------------------------------------------------------------------


def reference(logits: Tensor, wishes: Wishes) -> Tensor:
    """The same in torch, on any device."""
    weights = logits / wishes.temperature[:, None]
    weights -= weights.amax(-1, keepdim=True)
    weights.exp_()
    _drop(weights, limits(weights, wishes))
    return pick(weights, wishes.uniform)


def limits(weights: Tensor, wishes: Wishes) -> Tensor:
    """float32 [R]: what a candidate's weight must reach, where the best one of each row has weight 1."""
    vocabulary, least = weights.shape[1], wishes.min_p.clone()
    limited = ((wishes.top_k > 0) & (wishes.top_k < vocabulary)) | (wishes.top_p < 1.0)
    ranked = limited.nonzero()[:, 0]
    few = max([FEW, *(2 * wishes.top_k[ranked]).tolist()])
    for width in (few, max(few, MORE), vocabulary):
        if len(ranked):
            found, enough = _by_rank(weights, ranked, wishes, min(width, vocabulary))
            least[ranked] = torch.maximum(least[ranked], found)
            ranked = ranked[~enough]
    return least


def _by_rank(weights: Tensor, rows: Tensor, wishes: Wishes, width: int) -> tuple[Tensor, Tensor]:
    """(limits of top-k and top-p, whether `width` candidates were enough to know them; 0 where not), of some rows."""
    vocabulary = weights.shape[1]
    best = _largest(weights, rows, width)
    sums = best.double().cumsum(-1)
    k = wishes.top_k[rows].long()
    k = k.where(k < vocabulary, 0)
    kth = torch.where(k > 0, best.gather(1, (k.clamp(min=1) - 1)[:, None])[:, 0], 0.0)
    kept = (best >= kth[:, None]).sum(-1)
    inside = sums.gather(1, (kept - 1)[:, None])[:, 0]
    chosen = weights if len(rows) == len(weights) else weights[rows]
    total = torch.where(k > 0, inside, block_sums(chosen)[1][:, -1])
    top_p = wishes.top_p[rows]
    rank = (sums < (top_p * total)[:, None]).sum(-1)
    last = best.gather(1, rank.clamp(max=width - 1)[:, None])[:, 0]
    limited = top_p < 1.0
    found = torch.where(limited, torch.maximum(kth, last), kth)
    # Candidates as likely as the k-th may go on behind those that were sorted: then the sum over all is not known.
    enough = ~limited | ((rank < width) & ((k == 0) | (kept < width)))
    if width == vocabulary:
        enough = torch.ones_like(enough)
    return torch.where(enough, found, 0.0), enough


def _largest(weights: Tensor, rows: Tensor, width: int) -> Tensor:
    """float32 [len(rows), width]: the largest weights of some rows, in descending order."""
    if weights.device.type != "cpu":
        return weights[rows].topk(width, dim=-1).values
    # numpy sorts floats several times as fast as torch does.
    best = np.empty((len(rows), width), np.float32)
    for to, at in enumerate(rows.tolist()):
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
