"""Products of the factors of adapters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from multimodal_gen.kernels.float32_product import add_product_, float32_product, reference

pytestmark = [pytest.mark.kernels]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rank", [1, 16, 128, 129, 200, 256, 1000])
def test_the_bits_do_not_depend_on_the_number_of_threads(rank: int, threads: None) -> None:
    """Streamed weights are merged by one thread, those in memory by several."""
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(512, rank, generator=generator), torch.randn(rank, 1536, generator=generator)
    found, sums = [], []
    base = torch.randn(512, 1536, generator=generator)
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(float32_product(a, b))
        sums.append(add_product_(base.clone(), a, b, 0.7))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert all(torch.equal(sums[0], other) for other in sums[1:])
    torch.testing.assert_close(sums[0], base + 0.7 * found[0], rtol=1e-4, atol=1e-4 * rank**0.5)
    torch.testing.assert_close(found[0], reference(a.double(), b.double()).float(), rtol=1e-4, atol=1e-4 * rank**0.5)
