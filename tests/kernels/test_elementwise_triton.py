"""The Triton kernels between matrix products compute their references: interpreted, or on a GPU where there is one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal_gen.kernels import timestep_embedding
from multimodal_gen.kernels.norm_modulate import Norm
from tests.kernels.elementwise_cases import FAMILIES, TOLERANCE, Case

pytest.importorskip("triton")
pytestmark = [pytest.mark.kernels]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 5


def in_triton(case: Case) -> Callable[..., Tensor]:
    """The Triton side of a case's operation, which goes by the same name."""
    module = importlib.import_module(case.compute.__module__.replace(".kernels.", ".kernels.gpu."))
    return vars(module)[case.compute.__name__]


def smaller(case: Case) -> Case:
    """The first tokens of a case, on the device: the interpreter takes milliseconds for a program."""
    tokens = len(case.args[0])

    def cut(arg: Any) -> Any:
        if isinstance(arg, Norm):
            return Norm(*(cut(getattr(arg, field.name)) for field in fields(arg)))
        if not isinstance(arg, Tensor):
            return arg
        return (arg[:ROWS] if len(arg) == tokens > ROWS else arg).to(DEVICE)

    return Case(case.compute, case.reference, tuple(map(cut, case.args)), {n: cut(v) for n, v in case.options.items()})


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's words; the limit is right
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_triton_kernel_computes_its_reference(family: str, dtype: torch.dtype) -> None:
    for number, case in enumerate(map(smaller, FAMILIES[family](dtype))):
        for found, wanted in zip(case.run(in_triton(case)), case.run(case.reference), strict=True):
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(
                found, wanted, rtol=tolerance, atol=tolerance, msg=lambda why, number=number: f"case {number}: {why}"
            )


def test_timesteps_of_a_thousand_keep_their_last_digits() -> None:
    from multimodal_gen.kernels.gpu.timestep_embedding import timestep_embedding as in_triton

    values = torch.tensor([0.0, 0.001, 1.0, 37.5, 999.3, 1000.0], device=DEVICE)
    for dim in (2, 6, 256):
        exponents = torch.arange(dim // 2, dtype=torch.float64, device=DEVICE) / (dim // 2)
        angles = values.double()[:, None] * 10_000.0**-exponents
        wanted = torch.cat((angles.cos(), angles.sin()), 1).float()
        torch.testing.assert_close(in_triton(values, dim), wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(timestep_embedding.reference(values, dim), wanted, rtol=0, atol=2e-4)
    assert in_triton(values[:0], 8).shape == (0, 8)


def test_a_group_is_shared_out_by_the_number_of_multiprocessors() -> None:
    from multimodal_gen.kernels.gpu.gated_norm import rows_of

    assert rows_of(1, 1, 4096, 132) == 1
    assert rows_of(4096, 1, 1024, 132) == 4
    assert rows_of(400, 1, 1024, 132) == 2
    assert rows_of(4096, 1, 8192, 132) == 1
