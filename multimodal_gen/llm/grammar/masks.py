"""Taking tokens away that answers' grammars do not allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multimodal_gen.llm.sampling import SamplingRow


def mask(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Set what grammars forbid to -inf, in place on float32 [R, V].

    An end token that comes before min_tokens is forbidden, too, unless the grammar is complete: then it is right, and
    nothing else could follow.
    """
    ruled = [at for at, row in enumerate(rows) if row.matcher is not None]
    if not ruled:
        return
    from xgrammar import allocate_token_bitmask, apply_token_bitmask_inplace

    bits = allocate_token_bitmask(len(rows), logits.shape[1])
    for at in ruled:
        matcher = rows[at].matcher
        assert matcher is not None, "it is in the list for it"
        matcher.fill(bits, at)
    apply_token_bitmask_inplace(logits, bits.to(logits.device), vocab_size=logits.shape[1], indices=ruled)
    for at in ruled:
        if rows[at].forbidden:
            _forbid(logits[at], rows[at].forbidden)


def _forbid(logits: Tensor, tokens: tuple[int, ...]) -> None:
    before = logits[list(tokens)]
    logits[list(tokens)] = -torch.inf
    if not logits.isfinite().any():
        logits[list(tokens)] = before
