"""Pieces of updates, as ranks that share a weight merge them, against the same piece of the whole."""

from __future__ import annotations

import pytest
import torch

from multimodal_gen.lora.merge import Addends, Merge, piece
from multimodal_gen.lora.updates import Decomposed, Full, Hadamard, Kronecker, LowRank, Update
from multimodal_gen.nn.slots import Cut

pytestmark = [pytest.mark.unit]

OUT, IN = 24, 36


def make(kind: str) -> Update:
    torch.manual_seed(0)
    r = 3
    low = LowRank(torch.randn(r, IN), torch.randn(OUT, r), 0.7)
    kron = Kronecker((torch.randn(4, 3),), (torch.randn(6, 2), torch.randn(2, 12)), 0.4, 2)
    return {
        "low rank": low,
        "full": Full(torch.randn(OUT, IN)),
        "hadamard": Hadamard(torch.randn(OUT, r), torch.randn(r, IN), torch.randn(OUT, r), torch.randn(r, IN), 0.3),
        "kronecker": kron,
        "kronecker of a part": Kronecker((torch.randn(8, 3),), (torch.randn(6, 12),), 0.4, 0).take(slice(7, 7 + OUT)),
        "dora": Decomposed(low, torch.rand(OUT) + 0.5),
        "dora of kronecker": Decomposed(kron, torch.rand(OUT) + 0.5),
    }[kind]


def write(view: torch.Tensor, pristine: torch.Tensor, updates: Addends, columns: Cut | None = None) -> None:
    change = Merge(updates, columns).begin(view.device, view.dtype)
    for start in range(0, len(pristine), 5):
        rows = slice(start, min(start + 5, len(pristine)))
        view[rows] = change(rows, pristine[rows])


KINDS = ("low rank", "full", "hadamard", "kronecker", "kronecker of a part", "dora", "dora of kronecker")


@pytest.mark.parametrize("count", [2, 3, 4, 12])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_merged_is_the_piece_of_the_merged(kind: str, dim: int, count: int) -> None:
    update, pristine = make(kind), torch.randn(OUT, IN)
    whole = torch.empty(OUT, IN)
    write(whole, pristine, [(update, 0.9), (make("low rank"), -0.2)])
    assert not torch.allclose(whole, pristine)
    for index in range(count):
        cut = Cut(dim, index, count)
        view = whole[cut.index_of((OUT, IN))]
        found = torch.empty(view.shape)
        if dim == 1 and update.reads_base:
            write(found, pristine, [(update, 0.9), (make("low rank"), -0.2)], cut)
        else:
            mine = [(piece(part, cut), strength) for part, strength in ((update, 0.9), (make("low rank"), -0.2))]
            assert all(part.shape == view.shape for part, _ in mine)
            write(found, pristine[cut.index_of((OUT, IN))], mine)
        assert torch.allclose(found, view, rtol=1e-5, atol=1e-6)


def test_vectors_are_cut_too() -> None:
    diff, bias = torch.randn(12), torch.randn(12)
    cut = Cut(0, 1, 3)
    found = torch.empty(4)
    write(found, bias[cut.index_of((12,))], [(piece(Full(diff), cut), 2.0)])
    assert torch.allclose(found, (bias + 2 * diff)[4:8])
