"""What the model thought of tokens: natural logarithms of their probabilities, with the best candidates beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal_gen.kernels.sampling import block_sums
from multimodal_gen.text import TokenLogprob

# Rows whose logits are looked at together: a prompt of thousands of tokens would need gigabytes beside its logits.
CHUNK = 64


@dataclass(frozen=True, slots=True)
class Thoughts:
    """Of some rows, before grammars take candidates away."""

    whole: Tensor  # float32 [R], logsumexp
    values: Tensor  # float32 [R, n]: logits of the best candidates, best first
    ids: Tensor  # int64 [R, n]

    @classmethod
    def of(cls, logits: Tensor, tops: Sequence[int]) -> Thoughts:
        """Of float32 [R, V], where tops[r] candidates of row r are asked for."""
        values, ids = logits.topk(min(max(tops), logits.shape[1]), dim=-1)
        best = logits.amax(-1, keepdim=True)
        _, sums = block_sums((logits - best).exp_())
        return cls(best[:, 0] + sums[:, -1].log().float(), values, ids)

    def tell(self, ids: Sequence[int], chosen: Tensor, tops: Sequence[int]) -> list[TokenLogprob]:
        """About tokens ids[r] whose logits are chosen [R]."""
        own = (chosen - self.whole).tolist()
        values, best = (self.values - self.whole[:, None]).tolist(), self.ids.tolist()
        return [
            TokenLogprob(token, own[r], tuple(zip(best[r][:top], values[r][:top], strict=True)))
            for r, (token, top) in enumerate(zip(ids, tops, strict=True))
        ]


def tell(logits: Tensor, ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """About tokens ids[r], each after the logits float32 [R, V] of row r: what `echo` tells of a prompt."""
    told = list[TokenLogprob]()
    for start in range(0, len(ids), CHUNK):
        part, these = logits[start : start + CHUNK], ids[start : start + CHUNK]
        chosen = part.gather(1, torch.tensor(these).to(part.device)[:, None])[:, 0]
        told += Thoughts.of(part, [top] * len(these)).tell(these, chosen, [top] * len(these))
    return told
