"""Products with weights in blocks against their reference: plain weights, and int8 with rows that become int8, too."""

from __future__ import annotations

import pytest
import torch

from multimodal_gen.kernels import blocked_linear, native
from multimodal_gen.kernels.blocked_linear import BlockedWeight, from_blocks, to_blocks

pytestmark = [pytest.mark.kernels]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
ROWS = [0, 1, 2, 3, 11, 12, 13, 32, 37, 70]


def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def blocked(weight: torch.Tensor, dtype: torch.dtype, *, halves: bool) -> BlockedWeight:
    why = blocked_linear.unavailable(weight.shape, dtype, weight.dtype)
    if why:
        pytest.skip(why)
    return BlockedWeight(weight, dtype, halves)


@pytest.mark.parametrize("halves", [False, True], ids=["in order", "in halves"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_plain_weight_multiplies_as_its_reference(dtype: torch.dtype, halves: bool) -> None:
    weight, bias = made(96, 160, dtype=dtype) / 12, made(96, dtype=dtype)
    packed = blocked(weight, dtype, halves=halves)
    assert torch.equal(packed.plain(), weight)
    assert packed.nbytes == weight.nbytes
    for rows in ROWS:
        x = made(rows, 200, dtype=dtype)[:, :160]  # rows do not lie end to end
        wanted = (x.float() @ weight.float().T + bias.float()).to(dtype)
        torch.testing.assert_close(packed(x, bias), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("halves", [False, True], ids=["in order", "in halves"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_int8_multiplies_as_its_reference_and_near_the_weight(dtype: torch.dtype, halves: bool) -> None:
    weight, bias = made(96, 160, dtype=dtype) / 12, made(96, dtype=dtype)
    packed = blocked(weight, torch.int8, halves=halves)
    assert packed.nbytes < weight.numel() * 1.1
    for rows in ROWS[1:]:
        x = made(rows, 160, dtype=dtype)
        found = packed(x, bias)
        torch.testing.assert_close(
            found, blocked_linear.reference(x, packed, bias), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
        exact = x.float() @ weight.float().T + bias.float()
        assert (found.float() - exact).norm() < 0.015 * exact.norm(), rows


@pytest.mark.parametrize("weights", [None, torch.int8], ids=["all bits", "int8"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gate_and_up_come_out_as_silu_of_one_times_the_other(dtype: torch.dtype, weights: torch.dtype | None) -> None:
    weight, bias = made(96, 160, dtype=dtype) / 12, made(96, dtype=dtype)
    packed = blocked(weight, weights or dtype, halves=True)
    for rows in ROWS:
        x = made(rows, 160, dtype=dtype)
        found, wanted = packed.swiglu(x, bias), blocked_linear.swiglu_reference(x, packed, bias)
        assert found.shape == (rows, 48)
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    with pytest.raises(AssertionError, match="gate and up"):
        blocked(weight, weights or dtype, halves=False).swiglu(x, bias)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_token_has_the_same_sums_in_whatever_company(dtype: torch.dtype) -> None:
    packed = blocked(made(256, 160, dtype=dtype), dtype, halves=False)
    x = made(150, 160, dtype=dtype)
    together = packed(x, None)
    for rows in (3, 12, 40, 100):
        assert torch.equal(packed(x[:rows], None), together[:rows]), rows


def test_rows_of_zeros_are_zeros_in_int8_and_what_is_no_number_stays_none() -> None:
    packed = blocked(made(32, 64), torch.int8, halves=False)
    x = torch.stack((torch.zeros(64), made(64), made(64)))
    x[1, 7], x[2, 3] = torch.nan, torch.inf
    y = packed(x, None)
    assert torch.equal(y[0], torch.zeros(32))
    assert not y[1:].isfinite().any()


def test_without_the_library_the_reference_computes() -> None:
    weight = made(32, 64, dtype=torch.bfloat16)
    packed = blocked(weight, torch.bfloat16, halves=False)
    x = made(3, 64, dtype=torch.bfloat16)
    with native.torch_only():
        assert torch.equal(packed(x, None), (x.float() @ weight.float().T).bfloat16())
        assert "torch" in blocked_linear.unavailable(weight.shape, weight.dtype, weight.dtype)


def test_blocks_are_what_they_say() -> None:
    numbers = torch.arange(64 * 32, dtype=torch.int16).view(64, 32).view(torch.bfloat16)
    for halves, second in ((False, 16), (True, 32)):
        words = to_blocks(numbers, halves)
        assert words.shape == (2, 16, 32, 2)
        assert torch.equal(words[0, 3, 16].view(torch.int16), numbers[second, 6:8].view(torch.int16))
        assert torch.equal(from_blocks(words, halves).view(torch.int16), numbers.view(torch.int16))


def test_shapes_that_have_no_blocks_are_told() -> None:
    assert "40 outputs" in blocked_linear.unavailable((40, 64), torch.float32, torch.float32)
    assert "float16" in blocked_linear.unavailable((32, 64), torch.float16, torch.float16)
