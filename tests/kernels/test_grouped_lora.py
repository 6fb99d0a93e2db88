"""Low-rank updates of each token's own: C++, torch and Triton against tokens one by one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from multimodal_gen.kernels import native
from multimodal_gen.kernels.grouped_lora import grouped_lora_, reference

pytestmark = [pytest.mark.kernels]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # of the largest result
SHAPES = [
    (0, 16, 32, (4,)),
    (1, 40, 17, (16,)),
    (9, 33, 70, (3, 16, 0, 21)),
    (33, 64, 128, (16, 16, 8)),
]  # tokens, inputs, outputs, ranks of the groups
ids = [f"{tokens} tokens, ranks {'+'.join(map(str, ranks))}" for tokens, _, _, ranks in SHAPES]


def ways() -> Iterator[object]:
    yield pytest.param("native", id="C++")
    yield pytest.param("torch", id="torch")
    absent = importlib.util.find_spec("triton") is None
    yield pytest.param("triton", id="Triton", marks=pytest.mark.skipif(absent, reason="there is no Triton"))


def by(way: str) -> Callable[..., Tensor]:
    if way == "triton":
        from multimodal_gen.kernels.gpu.grouped_lora import grouped_lora_ as in_triton

        return in_triton
    return grouped_lora_


def device_of(way: str) -> str:
    """Triton runs on a GPU where there is one."""
    return "cuda" if way == "triton" and torch.cuda.is_available() else "cpu"


def case(shape: tuple[int, int, int, tuple[int, ...]], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    tokens, inputs, outputs, ranks = shape
    torch.manual_seed(tokens)
    y, x = torch.randn(tokens, outputs + 3)[:, :outputs], torch.randn(tokens, inputs + 5)[:, :inputs]  # rows apart
    down, up = torch.randn(inputs, sum(ranks)) / inputs**0.5, torch.randn(sum(ranks), outputs)
    starts = torch.tensor((0, *ranks)).cumsum(0).to(torch.int32)
    owners = torch.randint(-1, len(ranks), (tokens,), dtype=torch.int32)
    return (*(tensor.to(device, dtype) for tensor in (y, x, down, up)), starts.to(device), owners.to(device))


@pytest.mark.parametrize("way", [*ways()])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_every_token_gets_the_update_of_its_group(
    way: str, dtype: torch.dtype, shape: tuple[int, int, int, tuple[int, ...]]
) -> None:
    args = case(shape, dtype, device_of(way))
    wanted = reference(*args)
    if way == "torch":
        with native.torch_only():
            found = by(way)(*args)
    else:
        found = by(way)(*args)
    assert found is args[0]
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=TOLERANCE[dtype] * max([1.0, *wanted.abs().flatten().tolist()])
    )


@pytest.mark.parametrize("way", [*ways()])
def test_factors_of_others_may_hold_anything(way: str) -> None:
    y, x, down, up, starts, owners = case((8, 32, 48, (16, 16)), torch.float32, device_of(way))
    owners.fill_(0)
    wanted = reference(y, x, down, up, starts, owners)
    down[:, 16:] = torch.inf
    if way == "torch":  # what overflowed became zero; the factors of the way back are finite, as overlays' are
        with native.torch_only():
            found = by(way)(y, x, down, up, starts, owners)
    else:
        up[16:] = torch.nan
        found = by(way)(y, x, down, up, starts, owners)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
