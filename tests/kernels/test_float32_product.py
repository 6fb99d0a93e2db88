from __future__ import annotations

import pytest
import torch

from multimodal_gen.kernels.float32_product import float32_product, reference

pytestmark = [pytest.mark.kernels]


@pytest.mark.parametrize(("m", "r", "n"), [(1, 1, 1), (7, 3, 5), (64, 16, 96), (300, 48, 513), (1536, 8, 40)])
def test_equals_the_matrix_product(m: int, r: int, n: int) -> None:
    generator = torch.Generator().manual_seed(m + r + n)
    up, down = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
    got, want = float32_product(up, down), reference(up.double(), down.double())
    assert got.shape == want.shape
    assert got.is_contiguous()
    difference = (got - want).abs()
    bound = 1e-6 * (up.abs().double() @ down.abs().double())
    assert bool((difference <= bound).all()), f"max {difference.max():.2e}, mean {difference.mean():.2e}"


def test_takes_rows_of_a_larger_matrix() -> None:
    up, down = torch.randn(100, 6), torch.randn(6, 30)
    assert torch.allclose(float32_product(up[10:40], down), up[10:40] @ down, atol=1e-5)


@pytest.mark.parametrize(("up", "down"), [((4, 2), (3, 5)), ((4, 2), (2, 5))])
def test_guards(up: tuple[int, int], down: tuple[int, int]) -> None:
    with pytest.raises(AssertionError):
        float32_product(torch.randn(up), torch.randn(down, dtype=torch.float64))
