"""Tokens rounded to 8 bits in one pass, in Triton, as torch rounds them; and whole products in 8 bits on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multimodal_gen.kernels import fp8_product, int8_product

pytest.importorskip("triton")
pytestmark = [pytest.mark.kernels]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCES = {torch.int8: int8_product.quantize_reference, fp8_product.FORMAT: fp8_product.quantize_reference}
LARGEST = {torch.int8: float(int8_product.LARGEST), fp8_product.FORMAT: fp8_product.LARGEST}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("to", REFERENCES, ids=str)
def test_tokens_are_rounded_as_torch_rounds_them(to: torch.dtype, dtype: torch.dtype) -> None:
    from multimodal_gen.kernels.gpu.quantize_rows import quantize_rows

    torch.manual_seed(0)
    x = (torch.randn(6, 333) * torch.tensor([1, 1e-3, 0, 50, 1, 1])[:, None]).to(dtype)[:, :300]
    x[4, 7] = 1000  # an outlier, beside which most are below e4m3's normal numbers
    numbers, scales = quantize_rows(x.to(DEVICE), to, LARGEST[to])
    wanted, their_scales = REFERENCES[to](x)
    torch.testing.assert_close(scales.cpu(), their_scales, rtol=3e-7, atol=0)
    # The scale's last bit may turn a number that stands between two.
    apart = (numbers.cpu().float() - wanted.float()).abs()
    assert (apart > 0).float().mean() < 0.01
    assert (apart <= 1 if to == torch.int8 else apart <= wanted.float().abs() / 8 + 2**-9).all()
    assert quantize_rows(x.to(DEVICE)[:0], to, LARGEST[to])[0].shape == (0, 300)


def test_the_bits_of_e4m3_are_torchs() -> None:
    """Every number of the format, what lies between two of them, and a little to both sides of that."""
    from multimodal_gen.kernels.gpu.quantize_rows import quantize_rows

    exact = torch.arange(127, dtype=torch.uint8).view(fp8_product.FORMAT).float()
    between = (exact[1:] + exact[:-1]) / 2
    values = torch.cat([exact, between, between * (1 + 2**-20), between * (1 - 2**-20)])
    x = torch.cat([values, -values])[None]
    numbers, scales = quantize_rows(x.to(DEVICE), fp8_product.FORMAT, fp8_product.LARGEST)
    assert scales.item() == 1.0
    assert torch.equal(numbers.cpu().view(torch.uint8), x.to(fp8_product.FORMAT).view(torch.uint8))


@pytest.mark.parametrize("to", REFERENCES, ids=str)
def test_a_token_that_is_not_finite_does_not_come_out_finite(to: torch.dtype) -> None:
    from multimodal_gen.kernels.gpu.quantize_rows import quantize_rows

    x = torch.randn(4, 40, device=DEVICE)
    x[1, 39], x[2, 0] = torch.nan, torch.inf
    assert quantize_rows(x, to, LARGEST[to])[1].isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_sums_are_scaled_as_torch_scales_them(dtype: torch.dtype, bias: bool) -> None:
    from multimodal_gen.kernels.gpu.quantize_rows import finish

    torch.manual_seed(1)
    sums = torch.randint(-(2**24), 2**24, (3, 1500), dtype=torch.int32)
    tokens, outputs = torch.rand(3) / 1000, torch.rand(1500) / 1000
    b = torch.randn(1500).to(dtype) if bias else None
    y = torch.empty(3, 1500, dtype=dtype)
    wanted = int8_product.finish_reference(sums, tokens, outputs, b, y)
    given = (sums, tokens, outputs, b, torch.empty_like(y))
    found = finish(*(None if x is None else x.to(DEVICE) for x in given))
    torch.testing.assert_close(found.cpu(), wanted, rtol=2.0**-7 if dtype is torch.bfloat16 else 1e-3, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 33, 300])
def test_products_on_a_gpu_are_near_those_with_all_bits(kind: str, rows: int) -> None:
    torch.manual_seed(rows)
    x, weight = (torch.randn(*shape, device=DEVICE).to(torch.bfloat16) for shape in ((rows, 512), (768, 512)))
    bias = torch.randn(768, device=DEVICE).to(torch.bfloat16)
    made = {"int8": int8_product.Int8Weight, "fp8": fp8_product.Fp8Weight}[kind](weight)
    exact = F.linear(x.float(), weight.float(), bias.float())
    off = ((made(x, bias).float() - exact).norm() / exact.norm()).item()
    assert off < {"int8": 0.02, "fp8": 0.05}[kind]
