"""The packed product against its reference."""

from __future__ import annotations

import pytest
import torch

from multimodal_gen.kernels.packed_linear import pack, packed_linear, packed_linear_reference, unavailable

pytestmark = [pytest.mark.kernels]

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if not unavailable(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 96), (7, 576, 960), (33, 40, 17)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_what_the_reference_does(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inputs).to(dtype), (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    b = torch.randn(outputs).to(dtype) if bias else None
    found, want = packed_linear(x, pack(weight), b), packed_linear_reference(x, weight, b)
    ulp = 2.0**-7 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), want.float(), atol=2 * ulp, rtol=ulp)


def test_half_precision_is_not_packed() -> None:
    assert "float16" in unavailable(torch.float16)
    with pytest.raises(AssertionError, match="float16"):
        pack(torch.zeros(4, 4, dtype=torch.float16))
