"""Weights in 8 and 4 bits against float32 steps on the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multimodal_gen.kernels import int4_linear, int8_linear
from multimodal_gen.kernels.int4_linear import Int4Weight
from multimodal_gen.kernels.int8_linear import Int8Weight

pytestmark = [pytest.mark.kernels]

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest result


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE[found.dtype] * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, int8_linear.NARROW, int8_linear.NARROW + 1, 40])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (33, 100), (576, 192)])
def test_eight_bits_multiply_as_their_reference(out: int, width: int, rows: int, dtype: torch.dtype) -> None:
    weight, x, bias = made(out, width, dtype=dtype), made(rows, width, dtype=dtype, seed=1), made(out, dtype=dtype)
    numbers, scales = int8_linear.quantize(weight)
    wanted = int8_linear.reference(x, numbers, scales)
    assert_close(int8_linear.int8_linear(x, numbers, scales), wanted)
    assert_close(Int8Weight(weight)(x, bias), wanted + bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (16, 32), (592, 192)])
def test_four_bits_multiply_as_their_reference(out: int, width: int, rows: int, dtype: torch.dtype) -> None:
    weight, x, bias = made(out, width, dtype=dtype), made(rows, width, dtype=dtype, seed=1), made(out, dtype=dtype)
    wanted = int4_linear.reference(x, *int4_linear.quantize(weight))
    assert_close(Int4Weight(weight)(x, None), wanted)
    assert_close(Int4Weight(weight)(x, bias), wanted + bias)


def test_a_strided_input_is_read_as_it_is_meant() -> None:
    weight, x = made(32, 64), made(5, 128, seed=1)[:, 32:96]
    for kind in (Int8Weight, Int4Weight):
        assert torch.equal(kind(weight)(x, None), kind(weight)(x.contiguous(), None))


def test_eight_bits_are_within_half_a_step_of_the_weight() -> None:
    weight = made(40, 64) * torch.logspace(-6, 6, 40)[:, None]
    weight[3] = 0
    numbers, scales = int8_linear.quantize(weight)
    assert torch.all((numbers * scales[:, None] - weight).abs() <= 0.501 * scales[:, None])
    assert torch.all(numbers[3] == 0)


def test_four_bits_are_within_half_a_step_of_the_weight_and_meet_the_ends_of_each_group() -> None:
    weight = made(32, 128) * torch.logspace(-3, 3, 32)[:, None]
    weight[3] = 0.25
    numbers, scales = int4_linear.quantize(weight)
    identity = torch.eye(128)
    restored = int4_linear.reference(identity, numbers, scales).T
    steps = scales[..., 0].T.repeat_interleave(32, 1)
    assert torch.all((restored - weight).abs() <= 0.501 * steps + 1e-6)
    torch.testing.assert_close(restored[3], weight[3])
    groups = numbers[4:].unflatten(1, (-1, 32))
    assert torch.all(groups.amin(-1) == 0)
    assert torch.all(groups.amax(-1) == 15)


def test_blocks_with_a_smallest_number_of_sixteen_levels_come_through_unchanged() -> None:
    """As in GGUF's Q4_1."""
    levels = torch.randint(0, 16, (32, 4, 32), generator=torch.Generator().manual_seed(0)).float()
    levels[..., 0], levels[..., 1] = 0, 15
    weight = (levels * made(32, 4, 1, seed=2).abs() + made(32, 4, 1, seed=3)).flatten(1)
    x = made(3, 128, seed=4)
    assert_close(Int4Weight(weight)(x, None), F.linear(x, weight))


def test_fewer_bits_are_fewer_bytes() -> None:
    weight = made(512, 512, dtype=torch.bfloat16)
    assert Int8Weight(weight).nbytes < 0.51 * weight.nbytes
    assert Int4Weight(weight).nbytes < 0.32 * weight.nbytes
