"""Cross-attention: each packed sequence looks at keys of its own, most often a text that it shares with no other.

Reference models pad texts to a fixed length with zero vectors, which become one and the same key and value. Softmax
over m equal keys is softmax over one of them with log m added to its score, so a text is kept with one padding token
and a count: the result is the same, at a tenth of the memory and time for a prompt of fifty tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.attention.native import wins
from multimodal_gen.kernels.eager import eager_break
from multimodal_gen.kernels.packed_attention import packed_attention


@dataclass(frozen=True)
class Keys:
    """What the queries of one sequence look at."""

    k: Tensor  # [K, H, D]
    v: Tensor  # [K, H, D]
    last: int = 1  # how many times the last key counts

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.k.nbytes + self.v.nbytes


@eager_break(recorded=True)
def cross_attend(q: Tensor, lengths: Sequence[int], keys: Sequence[Keys]) -> Tensor:
    """q [T, H, D], packed sequences of these lengths, each with its keys → [T, H, D]; scale 1/√D."""
    if wins(q):
        return _by_kernel(q, lengths, keys)
    parts = [_attend(part, seen) for part, seen in zip(q.split(list(lengths)), keys, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_kernel(q: Tensor, lengths: Sequence[int], keys: Sequence[Keys]) -> Tensor:
    """Sequence by sequence, too: their keys lie apart, and each is enough for all threads."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for part, to, seen in zip(q.split(list(lengths)), out.split(list(lengths)), keys, strict=True):
        packed_attention(part, seen.k, seen.v, (len(part),), (len(seen.k),), counts=(seen.last,), out=to)
    return out


def _attend(q: Tensor, keys: Keys) -> Tensor:
    k, v, bias = keys.k, keys.v, None
    if keys.last > 1 and q.device.type == "cpu":
        # float32 whatever the dtype of q: log m rounded to bfloat16 would be a percent of error in the weight.
        bias = torch.zeros(len(k), dtype=torch.float32)
        bias[-1] = math.log(keys.last)
        bias = bias.expand(1, 1, len(q), -1)
    elif keys.last > 1:  # the fast kernels of GPUs take no such bias; there the key is repeated
        k, v = (torch.cat([x, x[-1:].expand(keys.last - 1, -1, -1)]) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, L, D]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)[0].transpose(0, 1)
