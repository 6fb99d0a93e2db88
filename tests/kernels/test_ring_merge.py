"""Joining attention over two sets of keys: compiled for this processor, and in Triton, against attention over both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multimodal_gen.kernels import native, packed_attention, ring_merge

pytestmark = [pytest.mark.kernels]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(0, 2, 8), (1, 1, 1), (7, 3, 37), (150, 4, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parts(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two results; of some rows one, or both, have seen no key."""
    random = torch.Generator().manual_seed(shape[0])
    out, more = (torch.randn(shape, generator=random) for _ in range(2))
    lse, more_lse = (torch.randn(shape[:2], generator=random) * 30 for _ in range(2))
    for sums, x, step in ((lse, out, 3), (more_lse, more, 5)):
        sums[::step] = -torch.inf
        x[::step] = 0
    return out, lse, more.to(dtype), more_lse


def check(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_processors_kernel_computes_its_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if native.unavailable():
        pytest.skip(native.unavailable())
    out, lse, more, more_lse = parts(shape, dtype)
    wanted = ring_merge.reference(out, lse, more, more_lse)
    ring_merge.ring_merge_(out, lse, more, more_lse)
    check((out, lse), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_triton_kernel_computes_its_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from multimodal_gen.kernels.gpu.ring_merge import ring_merge_

    wanted = ring_merge.reference(*parts(shape, dtype))
    out, lse, more, more_lse = (x.to(DEVICE) for x in parts(shape, dtype))
    ring_merge_(out, lse, more, more_lse)
    check((out, lse), wanted)


@pytest.mark.parametrize("way", ["auto", "torch"])
def test_blocks_of_keys_that_are_joined_are_attention_over_all_of_them(way: str) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 3, 16, generator=random) for n in (20, 50, 50))
    native.choose(way)
    try:
        out, lse = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
        for start, stop in ((0, 7), (7, 7), (7, 40), (40, 50)):
            part = packed_attention.packed_attention_lse(q, k[start:stop], v[start:stop], (20,), (stop - start,))
            ring_merge.ring_merge_(out, lse, *part)
    finally:
        native.choose("auto")
    check((out, lse), packed_attention.reference(q, k, v, (20,), (50,)))
