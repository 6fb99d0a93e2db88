"""The operations between matrix products: compiled for this processor, and by torch alone."""

from __future__ import annotations

import pytest
import torch

from multimodal_gen.kernels import native, norm_modulate
from multimodal_gen.kernels.gated_product import gated_product
from multimodal_gen.kernels.gated_residual import gated_residual_, gated_residual_norm_
from multimodal_gen.kernels.norm_modulate import Norm
from multimodal_gen.kernels.qk_norm_rope import qk_norm_rope_, turn
from multimodal_gen.kernels.timestep_embedding import timestep_embedding
from tests.kernels.elementwise_cases import FAMILIES, TOLERANCE

pytestmark = [pytest.mark.kernels]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_processors_kernel_computes_its_reference(family: str, dtype: torch.dtype) -> None:
    if native.unavailable():
        pytest.skip(native.unavailable())
    for number, case in enumerate(FAMILIES[family](dtype)):
        for found, wanted in zip(case.run(case.compute), case.run(case.reference), strict=True):
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(
                found, wanted, rtol=tolerance, atol=tolerance, msg=lambda why, number=number: f"case {number}: {why}"
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_and_a_machine_without_compiler_get_the_reference(family: str) -> None:
    for case in FAMILIES[family](torch.float16):
        assert all(map(_equal, case.run(case.compute), case.run(case.reference)))
    with native.torch_only():
        for case in FAMILIES[family](torch.bfloat16):
            assert all(map(_equal, case.run(case.compute), case.run(case.reference)))


def _equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_and_its_norm_in_one_pass_are_those_of_two_passes_bit_for_bit(dtype: torch.dtype) -> None:
    x, y, gate, scale = (torch.randn(n, 96).to(dtype) for n in (50, 50, 2, 2))
    index = (torch.arange(50) // 30).int()
    for norm in (Norm("rms", scale, None, index, 1e-5), Norm("layer", scale, gate, None, 1e-5)):
        together, apart = x.clone(), x.clone()
        found = gated_residual_norm_(together, y, gate, index, 1e-6, norm)
        wanted = norm_modulate.norm_modulate(gated_residual_(apart, y, gate, index, 1e-6), norm)
        assert torch.equal(found, wanted)
        assert torch.equal(together, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_does_not_depend_on_its_neighbours_nor_on_the_threads(dtype: torch.dtype) -> None:
    x, scale, turns = torch.randn(300, 3, 2, 64).to(dtype), torch.randn(2, 64).to(dtype), torch.randn(300, 2, 32)
    whole = qk_norm_rope_(x.clone(), scale, turns, 1e-5)
    for rows in (slice(0, 1), slice(17, 40)):
        assert torch.equal(qk_norm_rope_(x[rows].clone(), scale, turns[rows], 1e-5), whole[rows])


def test_parts_behind_the_weights_are_left_alone() -> None:
    x = torch.randn(6, 3, 2, 16)
    y = qk_norm_rope_(x.clone(), torch.ones(2, 16), None, 1e-5)
    assert torch.equal(x[:, 2], y[:, 2])
    assert not torch.equal(x[:, :2], y[:, :2])


def test_a_turn_is_the_textbook_one_in_both_layouts() -> None:
    x, angles = torch.randn(2, 5, 6), torch.tensor([[0.3, -2.0, 7.0], [1.0, 0.0, 100.0]])
    turns = torch.stack((angles.cos(), angles.sin()), 1)
    for pairs, places in (("neighbours", ((0, 1), (2, 3), (4, 5))), ("halves", ((0, 3), (1, 4), (2, 5)))):
        y = turn(x, turns, pairs)  # type: ignore[arg-type]
        for pair, (first, second) in enumerate(places):
            cos, sin = turns[:, :, pair, None].unbind(1)
            torch.testing.assert_close(y[..., first], x[..., first] * cos - x[..., second] * sin)
            torch.testing.assert_close(y[..., second], x[..., first] * sin + x[..., second] * cos)


def test_a_timesteps_embedding_is_cosines_then_sines() -> None:
    values = torch.tensor([0.0, 2.5])
    embedding = timestep_embedding(values, 8)
    rates = torch.tensor([10_000.0 ** (-i / 4) for i in range(4)])
    torch.testing.assert_close(embedding[:, :4], torch.cos(values[:, None] * rates))
    torch.testing.assert_close(embedding[:, 4:], torch.sin(values[:, None] * rates))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_a_number_stays_so_and_does_not_spread(dtype: torch.dtype) -> None:
    gate = torch.randn(4, 40).to(dtype)
    gate[1, 3], gate[2, 39] = torch.nan, torch.inf
    y = gated_product(gate, torch.ones_like(gate))
    assert y[1, 3].isnan()
    assert y[2, 39] == torch.inf
    assert int((~y.isfinite()).sum()) == 2


def test_tensors_that_do_not_fit_are_told_with_both_sides() -> None:
    x, scale = torch.zeros(4, 8), torch.zeros(2, 8)
    with pytest.raises(AssertionError, match=r"4, 8.*2, 9"):
        norm_modulate.rms_norm_scale(x, torch.zeros(2, 9), None, 1e-5)
    with pytest.raises(AssertionError, match=r"float32.*bfloat16"):
        norm_modulate.rms_norm_scale(x, scale.bfloat16(), None, 1e-5)
    with pytest.raises(AssertionError, match="int64"):
        norm_modulate.rms_norm_scale(x, scale, torch.zeros(4, dtype=torch.int64), 1e-5)
    with pytest.raises(AssertionError, match=r"16, 2"):
        gated_residual_(torch.zeros(4, 16)[:, ::2], x, scale, None)
    with pytest.raises(AssertionError, match=r"4, 2, 3.*4, 1, 1, 8"):
        qk_norm_rope_(x[:, None, None], torch.zeros(1, 8), torch.zeros(4, 2, 3), 1e-5)
