"""What decoders of pictures and videos compute with, against torch: convolutions, norms with SiLU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal_gen.kernels import conv3x3 as conv
from multimodal_gen.kernels import group_norm_silu as group_norm
from multimodal_gen.kernels import native
from multimodal_gen.kernels import rms_norm_silu as rms_norm
from multimodal_gen.pipelines.vaes.kl_decoder import Conv

pytestmark = [pytest.mark.kernels]

compiled = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())
# Of numbers around one. bfloat16: what comes out is rounded once.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# frames, height, width, in, out, taps, history, double
CONVOLUTIONS = {
    "a picture, odd sides, few channels": (1, 5, 7, 3, 5, 1, 0, False),
    "a picture, twice as large": (1, 6, 9, 64, 64, 1, 0, True),
    "many tiles, more than threads share": (1, 96, 112, 64, 80, 1, 0, False),
    "the first frame of a video": (1, 8, 8, 16, 32, 3, 0, False),
    "three frames, nothing before": (3, 6, 10, 16, 48, 3, 0, False),
    "two frames, one before": (2, 6, 5, 48, 64, 3, 1, False),
    "four frames, two before": (4, 9, 10, 96, 96, 3, 2, False),
    "four frames, one before, many tiles": (4, 64, 96, 16, 16, 3, 1, False),
    "to colours": (2, 9, 8, 40, 3, 3, 2, False),
}


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def convolution(case: str, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    frames, height, width, channels, out, taps, history, double = CONVOLUTIONS[case]
    weight = numbers(out, channels, taps, 3, 3, dtype=dtype, seed=1) / (9 * taps * channels) ** 0.5
    x = numbers(history + frames, height, width, channels, dtype=dtype)
    residual = numbers(frames, height << double, width << double, out, dtype=dtype, seed=3)
    return (x, weight, numbers(out, dtype=dtype, seed=2)), {"history": history, "residual": residual, "double": double}


def doubled(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}


@compiled
def test_small_filters_are_kept_until_they_are_let_go_of() -> None:
    for channels, kept in ((64, True), (256, False)):
        layer = Conv(channels, channels)
        layer.weight.copy_(numbers(channels, channels, 3, 3, dtype=torch.float32) / channels)
        layer.bias.zero_()
        x = numbers(1, 9, 8, channels, dtype=torch.float32)
        first = layer(x)
        assert (layer._filters is not None) == kept == (layer.kept_bytes > 0)
        assert torch.equal(layer(x), first)
        layer.forget()
        assert layer._filters is None
        assert torch.equal(layer(x), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_is_that_of_torch(case: str, dtype: torch.dtype) -> None:
    args, options = convolution(case, dtype)
    wanted = conv.reference(*(arg.double() for arg in args), **doubled(options))
    check(conv.conv3x3(*args, **options), wanted, dtype)
    kept = conv.make_filters(args[1])
    check(conv.conv3x3(*args, **options, filters=kept), wanted, dtype)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_compiled_convolution_is_right_where_the_direct_one_is_preferred(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "_direct_wins", lambda weight: False)
    args, options = convolution(case, dtype)
    wanted = conv.reference(*(arg.double() for arg in args), **doubled(options))
    check(conv.conv3x3(*args, **options, filters=conv.make_filters(args[1])), wanted, dtype)


@compiled
def test_filters_that_are_used_once_are_made_for_many_tiles_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = list[int](), conv.make_filters
    monkeypatch.setattr(conv, "make_filters", lambda weight: made.append(len(weight)) or make(weight))
    weight, bias = numbers(64, 64, 1, 3, 3, dtype=torch.float32, seed=1) / 24, torch.zeros(64)
    for side, times in ((24, 0), (28, 1)):  # 36 and 49 tiles
        x = numbers(1, side, side, 64, dtype=torch.float32)
        check(conv.conv3x3(x, weight, bias), conv.reference(x.double(), weight.double(), bias.double()), torch.float32)
        assert len(made) == times


@compiled
def test_a_pixel_does_not_depend_on_where_tiles_begin_if_they_begin_at_multiples_of_four() -> None:
    x, weight = numbers(1, 40, 48, 32, dtype=torch.float32), numbers(32, 32, 1, 3, 3, dtype=torch.float32, seed=1)
    bias = torch.zeros(32)
    all_of_it = conv.conv3x3(x, weight, bias)
    part = conv.conv3x3(x[:, 8:36, 12:44].contiguous(), weight, bias)
    assert torch.equal(part[:, 4:-4, 4:-4], all_of_it[:, 12:32, 16:40])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("channels", [3, 16, 40, 96, 384])
def test_an_rms_norm_is_that_of_torch(channels: int, silu: bool, dtype: torch.dtype) -> None:
    x, weight = numbers(2, 5, 7, channels, dtype=dtype), numbers(channels, dtype=dtype, seed=1)
    x[0, 0, 0] = 0
    wanted = rms_norm.reference(x.double(), weight.double(), silu=silu)
    check(rms_norm.rms_norm_silu(x, weight, silu=silu), wanted.double(), dtype)
    assert rms_norm.rms_norm_silu(x, weight, silu=silu, out=x) is x
    check(x, wanted.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 8, 4), (70, 61, 32, 16), (1, 1, 96, 32), (9, 8, 512, 32)], ids=str)
def test_a_group_norm_is_that_of_torch(shape: tuple[int, ...], silu: bool, dtype: torch.dtype) -> None:
    *sides, groups = shape
    x, weight = numbers(*sides, dtype=dtype) * 3 + 20, numbers(sides[-1], dtype=dtype, seed=1)
    bias = numbers(sides[-1], dtype=dtype, seed=2)
    x = x.contiguous()
    by_torch = torch.nn.functional.group_norm(
        x.double().permute(2, 0, 1)[None], groups, weight.double(), bias.double(), 1e-6
    )
    wanted = by_torch[0].permute(1, 2, 0)
    wanted = torch.nn.functional.silu(wanted) if silu else wanted
    check(group_norm.group_norm_silu(x, weight, bias, groups, 1e-6, silu=silu), wanted, dtype)
    group_norm.group_norm_silu(x, weight, bias, groups, 1e-6, silu=silu, out=x)
    check(x, wanted, dtype)


@compiled
def test_the_compiled_norms_do_not_depend_on_the_threads() -> None:
    x, weight = numbers(120, 150, 32, dtype=torch.bfloat16), numbers(32, dtype=torch.bfloat16, seed=1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(group_norm.group_norm_silu(x, weight, weight, 8, 1e-6))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", [True, False])
def test_the_triton_norms_compute_their_references(silu: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from multimodal_gen.kernels.gpu.group_norm_silu import group_norm_silu
    from multimodal_gen.kernels.gpu.rms_norm_silu import rms_norm_silu

    for channels in (3, 32, 96):
        x, weight = numbers(7, 31, channels, dtype=dtype).to(DEVICE), numbers(channels, dtype=dtype, seed=1).to(DEVICE)
        wanted = rms_norm.reference(x.double(), weight.double(), silu=silu).double()
        check(rms_norm_silu(x, weight, silu, torch.empty_like(x)), wanted, dtype)
    assert rms_norm_silu(x[:0], weight, silu, torch.empty_like(x[:0])).shape == (0, 31, 96)
    for channels, groups in ((6, 3), (32, 8)):
        x = (numbers(71, 67, channels, dtype=dtype) * 2 + 10).contiguous().to(DEVICE)
        weight, bias = (numbers(channels, dtype=dtype, seed=seed).to(DEVICE) for seed in (1, 2))
        pixels = x.double().permute(2, 0, 1)[None]
        by_torch = torch.nn.functional.group_norm(pixels, groups, weight.double(), bias.double(), 1e-6)[0]
        wanted = (torch.nn.functional.silu(by_torch) if silu else by_torch).permute(1, 2, 0)
        check(group_norm_silu(x, weight, bias, groups, 1e-6, silu, torch.empty_like(x)), wanted, dtype)
