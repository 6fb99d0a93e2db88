"""Every attention backend that can run here against the written-out reference."""

from __future__ import annotations

import pytest
import torch

from multimodal_gen.attention import registry
from multimodal_gen.attention.segments import Segments
from multimodal_gen.errors import ConfigError

pytestmark = [pytest.mark.unit]

CPU = torch.device("cpu")
USABLE = [name for name, reason in registry.available(CPU).items() if not reason]


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
    with pytest.raises(ConfigError, match=r"sdpaa.*Available: auto, onednn, sdpa, naive.*Did you mean 'sdpa'"):
        registry.choose("sdpaa", CPU)
