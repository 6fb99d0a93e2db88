"""Every attention backend that can run here against the written-out reference."""

from __future__ import annotations

import pytest
import torch

from multimodal_gen.attention import registry
from multimodal_gen.attention.segments import Segments
from multimodal_gen.errors import ConfigError
from multimodal_gen.kernels import native

pytestmark = [pytest.mark.unit]

CPU = torch.device("cpu")
USABLE = [name for name, reason in registry.available(CPU).items() if not reason]
GIVE_LSE = [name for name in USABLE if name in registry.GIVE_LSE]


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("lengths", [(5,), (7, 7, 7), (3, 3, 40, 1), (64, 32, 64), (530, 20, 530)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_with_the_reference(name, lengths, dtype):
    torch.manual_seed(0)
    segments = Segments.of(lengths)
    q, k, v = (torch.randn(segments.total, 3, 16).to(dtype) for _ in range(3))
    expected = registry.choose("naive", CPU)(q.float(), k.float(), v.float(), segments)
    got = registry.choose(name, CPU)(q, k, v, segments)
    assert got.dtype == dtype
    error = (got.float() - expected).abs()
    limit = 2e-6 if dtype == torch.float32 else 2e-2
    assert error.max() < limit, f"{name}: max {error.max():.2e}, mean {error.mean():.2e}"


@pytest.mark.parametrize("name", USABLE)
def test_a_segment_does_not_see_its_neighbours(name):
    torch.manual_seed(0)
    q, k, v = (torch.randn(30, 2, 8) for _ in range(3))
    attend = registry.choose(name, CPU)
    together = attend(q, k, v, Segments.of([10, 20]))
    alone = attend(q[:10], k[:10], v[:10], Segments.of([10]))
    assert torch.equal(together[:10], alone)


def test_an_unknown_backend_is_an_error_that_lists_the_available_ones():
    with pytest.raises(
        ConfigError, match=r"sdpaa.*Available: auto, (native, )?onednn, sdpa, naive.*Did you mean 'sdpa'"
    ):
        registry.choose("sdpaa", CPU)


def test_none_of_our_kernels_is_taken_where_they_are_switched_off():
    with native.torch_only():
        assert registry.choose("auto", CPU).name in ("onednn", "sdpa")
        with pytest.raises(ConfigError, match=r"native cannot run on cpu: it is switched off \(--kernels torch\)"):
            registry.choose("native", CPU)


@pytest.mark.parametrize("name", GIVE_LSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_blocks_of_keys_join_to_the_whole_by_their_log_sum_exp(name, dtype):
    torch.manual_seed(0)
    queries, left, right = Segments.of([5, 5, 0, 3, 7]), Segments.of([4, 4, 2, 0, 9]), Segments.of([1, 1, 3, 6, 0])
    q = torch.randn(queries.total, 3, 16).to(dtype)
    blocks = [(torch.randn(s.total, 3, 16).to(dtype), torch.randn(s.total, 3, 16).to(dtype)) for s in (left, right)]
    whole = [
        torch.cat([part for pair in zip(a.split(left.lengths), b.split(right.lengths), strict=True) for part in pair])
        for a, b in zip(*blocks, strict=True)
    ]
    both = Segments.of([a + b for a, b in zip(left.lengths, right.lengths, strict=True)])
    expected, lse = registry.choose_with_lse("naive", CPU).with_lse(
        q.float(), whole[0].float(), whole[1].float(), queries, both
    )
    attend = registry.choose_with_lse(name, CPU)
    (out_a, lse_a), (out_b, lse_b) = (
        attend.with_lse(q, k, v, queries, s) for (k, v), s in zip(blocks, (left, right), strict=True)
    )
    assert out_a.dtype == dtype
    assert lse_a.dtype == torch.float32
    total = torch.logaddexp(lse_a, lse_b)
    joined = (lse_a - total).exp()[..., None] * out_a + (lse_b - total).exp()[..., None] * out_b
    limit = 2e-6 if dtype == torch.float32 else 2e-2
    assert (total - lse).abs().max() < limit
    assert (joined - expected).abs().max() < limit


def test_no_keys_give_nothing():
    for name in GIVE_LSE:
        out, lse = registry.choose_with_lse(name, CPU).with_lse(
            torch.randn(3, 2, 8), torch.empty(0, 2, 8), torch.empty(0, 2, 8), Segments.of([3]), Segments.of([0])
        )
        assert torch.equal(out, torch.zeros(3, 2, 8))
        assert torch.equal(lse, torch.full((3, 2), -torch.inf))


def test_ring_needs_a_backend_with_log_sum_exp():
    assert registry.choose_with_lse("auto", CPU).name in registry.GIVE_LSE
    with pytest.raises(ConfigError, match=r"onednn cannot run on cpu: it gives no log-sum-exp.*auto, .*sdpa, naive"):
        registry.choose_with_lse("onednn", CPU)
