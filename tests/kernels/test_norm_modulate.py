"""Norm and scale in one pass, in Triton, against the reference."""

from __future__ import annotations

import pytest
import torch

from multimodal_gen.kernels import norm_modulate

pytestmark = [pytest.mark.kernels]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative: one rounding
SHAPES = [(0, 8, 1), (1, 1, 1), (3, 16, 2), (7, 37, 3), (130, 1536, 2), (64, 1000, 5)]


def case(tokens: int, dim: int, segments: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens + dim)
    x = torch.randn(tokens, dim + 3, generator=generator).to(dtype)[:, :dim]  # rows do not lie end to end
    scale = torch.randn(segments, dim, generator=generator).to(dtype)
    index = torch.randint(segments, (tokens,), generator=generator, dtype=torch.int32).sort().values
    return x.to(device), scale.to(device), index.to(device)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_triton_kernel_computes_its_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from multimodal_gen.kernels.gpu import norm_modulate as triton_kernel

    x, scale, index = case(*shape, dtype, DEVICE)
    found = triton_kernel.rms_norm_scale(x, scale, index, 1e-6)
    wanted = norm_modulate.rms_norm_scale_reference(x, scale, index, 1e-6)
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
