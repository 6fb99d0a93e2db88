"""Steps that are extrapolated instead of computed, row by row (decision 036).

A row under a step cache remembers the clean latents x̂₀ = x − σ·v that its last computed steps came to, guidance
included. A step that is skipped takes the polynomial through the newest of them, in λ = log((1 − σ) / σ), and goes on
with the velocity v = (x − x̂₀) / σ. All that is remembered is a few tensors of the latents' size in the row itself: rows
with and without a cache share a forward, and a row can be paused anywhere.

Which steps are skipped is the row's `step_cache`: every one but the n-th (`Taylor`), or those at which the first block
of the transformer, which is always computed, adds nearly what it added when the others were last computed
(`FirstBlock`).

Everything here is a function of the row alone and of what all ranks know, so that all ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from multimodal_gen.pipelines.contract import Row
from multimodal_gen.pipelines.history import History, Known
from multimodal_gen.pipelines.stages.solvers import state_of
from multimodal_gen.step_cache import FirstBlock, Taylor

Choice = Literal["compute", "ask", "skip"]  # ask: the first block decides
Kind = Callable[[Row, int], Hashable]  # (row, step) → what computes it: steps of one kind lie on one curve

MOST_NOISE = 1e-6  # λ of pure noise would be -∞: 1 - σ is taken to be no less


def watched(row: Row) -> bool:
    """Whether what the first block adds is of interest."""
    return isinstance(row.request.step_cache, FirstBlock)


def choose(row: Row, kind: Kind) -> Choice:
    """What becomes of a row's next step."""
    cache, step = row.request.step_cache, row.step
    if cache is None or step < cache.first or step == row.request.num_inference_steps - 1:
        return "compute"
    known = _of_kind(row, kind)
    if len(known) <= cache.order:
        return "compute"
    since = step - known[-1].step
    if isinstance(cache, Taylor):
        return "skip" if since < cache.interval else "compute"
    return "ask" if since <= cache.most else "compute"


def similar(rows: Sequence[Row], heads: Sequence[Tensor]) -> list[bool]:
    """Whether the first block adds nearly what it added when `rows` were last computed. All of them are asked.

    Args:
        heads: float32 [branches, tokens, D] of each row: what it adds now.
    """
    if not rows:
        return []
    changes = torch.stack([change(row.history.head, head) for row, head in zip(rows, heads, strict=True)]).tolist()
    return [found < _threshold(row) for row, found in zip(rows, changes, strict=True)]


def change(before: Tensor | None, now: Tensor) -> Tensor:
    """Mean absolute difference, as a share of the mean absolute value before: over all branches of a row together."""
    assert before is not None, "a row that is asked has been computed before"
    return (now - before).abs().mean() / before.abs().mean()


def extrapolated(row: Row, kind: Kind) -> Tensor:
    """dx/dσ of a step that is skipped, float32, shaped like the latents."""
    cache, sigmas = row.request.step_cache, state_of(row).sigmas
    assert cache is not None, "only rows with a cache skip steps"
    assert row.latents is not None, "prepare() comes before denoise()"
    nodes = _of_kind(row, kind)[-cache.order - 1 :]
    weights = weights_at(_log_snr(sigmas, row.step), [_log_snr(sigmas, known.step) for known in nodes])
    clean = torch.zeros_like(row.latents)
    for weight, node in zip(weights, nodes, strict=True):
        clean += weight * node.clean
    return (row.latents - clean) / sigmas[row.step]


def weights_at(x: float, nodes: Sequence[float]) -> list[float]:
    """Lagrange: what values at `nodes` count for in the value at x of the polynomial through them."""
    return [
        math.prod((x - other) / (node - other) for j, other in enumerate(nodes) if j != i)
        for i, node in enumerate(nodes)
    ]


@dataclass(frozen=True)
class Computed:
    """A step that was computed."""

    velocity: Tensor  # dx/dσ with guidance, float32, shaped like the latents
    head: Tensor | None = None  # [branches, tokens, D]: what the first block added, for rows that are `watched`


def advance(row: Row, computed: Computed | None, kind: Kind) -> tuple[Tensor, History]:
    """dx/dσ of a row's next step, which is extrapolated where nothing was computed, and what the row then remembers."""
    cache, history = row.request.step_cache, row.history
    if computed is None:
        return extrapolated(row, kind), replace(history, skipped=history.skipped + 1)
    if cache is None:
        return computed.velocity, history
    assert row.latents is not None, "prepare() comes before denoise()"
    newest = Known(row.step, row.latents - state_of(row).sigmas[row.step] * computed.velocity)
    known = (*_of_kind(row, kind), newest)[-cache.order - 1 :]
    return computed.velocity, replace(history, known=known, head=computed.head if watched(row) else None)


def _of_kind(row: Row, kind: Kind) -> list[Known]:
    now = kind(row, row.step)
    return [known for known in row.history.known if kind(row, known.step) == now]


def _threshold(row: Row) -> float:
    assert isinstance(row.request.step_cache, FirstBlock), "only such rows are asked"
    return row.request.step_cache.threshold


def _log_snr(sigmas: Tensor, step: int) -> float:
    clean = max(1.0 - float(sigmas[step]), MOST_NOISE)
    return math.log(clean / (1.0 - clean))
