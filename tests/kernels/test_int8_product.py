"""Products of 8-bit numbers: exact sums of what is rounded, by C++ and by torch, and how far from the truth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multimodal_gen.kernels import int8_product, native
from multimodal_gen.kernels.int8_product import Int8Weight, finish, quantize, quantize_reference, reference

pytestmark = [pytest.mark.kernels]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
wants_vnni = pytest.mark.skipif(bool(int8_product.unavailable(CPU)), reason=int8_product.unavailable(CPU) or "-")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (5, 17), (33, 100), (160, 320)])
def test_tokens_are_rounded_alike_by_both(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(shape[0])
    x = (torch.randn(shape) * 10 * torch.rand(shape[0], 1)).to(dtype)
    x[1:2] = 0
    for found, wanted in zip(quantize(x), quantize_reference(x), strict=True):
        assert torch.equal(found, wanted)
    assert quantize(x)[0].abs().amax(1).tolist() == [0 if row == 1 else 127 for row in range(len(x))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_sums_are_scaled_alike_by_both(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(1)
    sums = torch.randint(-(2**24), 2**24, (7, 45), dtype=torch.int32)
    tokens, outputs = torch.rand(7) / 1000, torch.rand(45) / 1000
    b = torch.randn(45).to(dtype) if bias else None
    found = finish(sums, tokens, outputs, b, dtype)
    with native.torch_only():
        wanted = finish(sums, tokens, outputs, b, dtype)
    # One rounding of float32 apart: the compiler may add the bias in the same instruction as it multiplies.
    torch.testing.assert_close(found, wanted, rtol=2.0**-7 if dtype is torch.bfloat16 else 1e-3, atol=1e-5)


def test_a_token_that_is_not_a_number_stays_so() -> None:
    x = torch.randn(3, 40)
    x[1, 39] = torch.nan
    assert quantize(x)[1].isnan().tolist() == [False, True, False]


@wants_vnni
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 32, 48), (1, 64, 96), (33, 40, 17), (70, 576, 960)])
def test_it_computes_what_the_reference_does(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_product, "SUMS_BYTES", 4 * outputs * 32)  # so that 33 and 70 rows are several blocks
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inputs).to(dtype), (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    packed = Int8Weight(weight)
    numbers, scales = quantize(weight)
    wanted = reference(x, numbers, scales)
    found = packed(x, None)
    torch.testing.assert_close(found, wanted, rtol=2.0**-7 if dtype is torch.bfloat16 else 1e-3, atol=1e-5)
    torch.testing.assert_close(packed(x, bias).float(), found.float() + bias.float(), rtol=0.01, atol=0.01)
    assert numbers.nbytes <= packed.nbytes < 1.2 * numbers.nbytes


@wants_vnni
def test_rounding_loses_little_over_a_hundredth() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 1536), torch.randn(256, 1536)
    exact = F.linear(x, weight)
    assert (Int8Weight(weight)(x, None) - exact).norm() / exact.norm() < 0.015
