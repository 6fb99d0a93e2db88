"""Tokens out of logits against the reference: compiled for this processor, and in Triton."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from multimodal_gen.kernels import native, sampling
from multimodal_gen.kernels.sampling import Wishes

pytestmark = [pytest.mark.kernels]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# temperature, top_k, top_p, min_p
ASKED = [
    (1.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.0),
    (2.5, 7, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.05, 0.0),
    (5.0, 0, 0.999, 0.0),
    (1.0, 0, 1.0, 0.2),
    (1.0, 50, 0.7, 0.01),
    (4.0, 290, 0.99, 0.0),
    (1.0, 10_000, 1.0, 0.0),
    (1e-3, 0, 1.0, 0.0),
]


def case(vocabulary: int, draws: int, device: str) -> tuple[Tensor, Wishes]:
    """Every wish several times, over logits of bfloat16: many candidates are equally likely."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows = len(ASKED) * draws
    logits = (torch.randn(rows, vocabulary, generator=generator) * 3).bfloat16().float()
    logits[:, vocabulary // 2 :][:, 1:3] = -torch.inf  # forbidden
    temperature, top_k, top_p, min_p = (torch.tensor(column).repeat(draws) for column in zip(*ASKED, strict=True))
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    uniform[:: draws + 1], uniform[1 :: draws + 1] = 0.0, 1 - 2.0**-53
    wishes = (temperature.float(), top_k.int(), top_p.double(), min_p.float(), uniform)
    return logits.to(device), Wishes(*(wish.to(device) for wish in wishes))


def assert_same(way: Callable[[Tensor, Wishes], Tensor], logits: Tensor, wishes: Wishes) -> None:
    """A number on the border between two candidates may point at either: sums are rounded in different orders."""
    found, wanted = way(logits, wishes), sampling.reference(logits, wishes)
    weights = ((logits - logits.amax(-1, keepdim=True)) / wishes.temperature[:, None]).exp().double()
    least = sampling.limits(weights.float(), wishes).double()
    kept = weights.where(weights >= least[:, None] * (1 - 1e-6), 0.0)
    sums = kept.cumsum(-1) / kept.sum(-1, keepdim=True)
    for row in (found != wanted).nonzero()[:, 0].tolist():
        between = sums[row, min(found[row], wanted[row])]
        assert kept[row, found[row]] > 0, row
        assert abs(between - wishes.uniform[row]) < 1e-5, (row, found[row], wanted[row])
    assert (found != wanted).sum() <= 1 + len(found) // 30


@pytest.mark.parametrize("vocabulary", [1, 37, 300, 1000, 5000])
def test_the_processors_kernel_chooses_as_its_reference(vocabulary: int) -> None:
    if native.unavailable():
        pytest.skip(native.unavailable())
    assert_same(sampling.sample, *case(vocabulary, 10, "cpu"))


@pytest.mark.parametrize("vocabulary", [1, 37, 300])
def test_the_triton_kernel_chooses_as_its_reference(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from multimodal_gen.kernels.gpu import sampling as triton_kernel

    monkeypatch.setattr(triton_kernel, "TILE", 128)
    assert_same(triton_kernel.sample, *case(vocabulary, 1, DEVICE))


def test_the_best_is_the_first_of_the_largest_and_what_is_no_number_is_told() -> None:
    logits = case(1000, 1, "cpu")[0]
    logits[3, 700], logits[5, 999], logits[7] = torch.nan, torch.inf, -torch.inf
    values, ids = sampling.best(logits)
    finite = [row for row in range(len(logits)) if row != 3]
    first = [(logits[row] == logits[row].max()).nonzero()[0].item() for row in finite]
    assert ids[finite].tolist() == first
    assert torch.equal(values[finite], logits[finite].amax(-1))
    assert values[3].isnan()
    with native.torch_only():
        assert sampling.best(logits)[1][finite].tolist() == first


def test_no_rows_are_no_tokens() -> None:
    empty = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float64, "min_p": torch.float32}
    wishes = Wishes(**{name: torch.empty(0, dtype=kind) for name, kind in {**empty, "uniform": torch.float64}.items()})
    assert sampling.sample(torch.empty(0, 100), wishes).shape == (0,)
    assert sampling.best(torch.empty(0, 100))[1].shape == (0,)
