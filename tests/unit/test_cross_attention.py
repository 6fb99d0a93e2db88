"""Cross-attention with a counted padding key against attention to every padding key, as reference models have it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.attention.cross import Keys, cross_attend

pytestmark = [pytest.mark.unit]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(q: Tensor, keys: Keys) -> Tensor:
    """Every copy of the last key written out, in float64."""
    copies = keys.last - 1
    k, v = (torch.cat([x, x[-1:].expand(copies, -1, -1)]) for x in (keys.k, keys.v))
    batched = [x.double().transpose(0, 1)[None] for x in (q, k, v)]
    return F.scaled_dot_product_attention(*batched)[0].transpose(0, 1)


@pytest.mark.parametrize("last", [1, 2, 17, 511])
@pytest.mark.parametrize(("queries", "length", "heads", "width"), [(7, 1, 2, 8), (40, 13, 3, 24), (130, 60, 4, 128)])
def test_a_counted_key_is_as_many_keys(queries: int, length: int, heads: int, width: int, last: int) -> None:
    q = numbers(queries, heads, width, seed=1)
    keys = Keys(numbers(length, heads, width, seed=2), numbers(length, heads, width, seed=3), last)
    torch.testing.assert_close(cross_attend(q, [queries], [keys]).double(), padded(q, keys), rtol=0, atol=2e-6)


def test_half_precision_keeps_the_count() -> None:
    """log 452 rounded to bfloat16 would be off by a percent of the padding's weight, all in one direction."""
    q, k, v = (numbers(n, 2, 64, seed=n).bfloat16() for n in (50, 20, 21))
    v = v[:20]
    keys = Keys(k, torch.cat([v[:-1] * 0.01, torch.ones_like(v[-1:])]), 452)
    want = padded(q, keys)
    got = cross_attend(q, [50], [keys]).double()
    assert float((got - want).mean().abs()) < 1e-3
    assert float((got - want).abs().max()) < 8e-3  # one rounding of the result


def test_every_sequence_has_keys_of_its_own() -> None:
    q = numbers(12, 2, 8, seed=1)
    keys = [Keys(numbers(n, 2, 8, seed=n), numbers(n, 2, 8, seed=n + 9), n) for n in (3, 1, 5)]
    got = cross_attend(q, [4, 7, 1], keys)
    want = torch.cat([padded(part, own) for part, own in zip(q.split([4, 7, 1]), keys, strict=True)])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
