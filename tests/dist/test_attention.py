"""Attention over slices of a sequence, and what else is shared out, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from multimodal_gen.attention import registry
from multimodal_gen.attention.segments import Segments
from multimodal_gen.nn.norm import rms_normalize
from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.group import Group
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.parallel.sequence import TokenShards
from tests.dist.cases import attention_inputs, feed_forward, random_tensors
from tests.support.ranks import Ranks

pytestmark = [pytest.mark.dist]

CASES = 60
CPU = torch.device("cpu")
BACKENDS = [name for name in registry.GIVE_LSE if name != "naive" and not registry.available(CPU)[name]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(ulysses=2),
        Degrees(ulysses=4),
        Degrees(ring=2),
        Degrees(ring=3),
        Degrees(ring=4),
        Degrees(ulysses=2, ring=2),
    ],
    ids=str,
)
def test_slices_see_their_whole_segments_and_nothing_else(ranks: Ranks, degrees: Degrees, backend: str) -> None:
    results = ranks.run(degrees, "tests.dist.cases:attention", backend=backend, cases=CASES)
    reference = registry.choose("naive", CPU)
    for number in range(CASES):
        q, k, v, segments = attention_inputs(number, degrees.sp)
        expected = reference(q.float(), k.float(), v.float(), segments)
        for found in results:
            got = found[str(number)]
            assert got.dtype == q.dtype
            error = float((got.float() - expected).abs().max())
            assert error < (5e-6 if q.dtype == torch.float32 else 3e-2), f"{segments.lengths}: {error:.2e}"
            assert torch.equal(got, results[0][str(number)])


def test_whole_segments_are_attended_without_communication(ranks: Ranks) -> None:
    for degrees in (Degrees(ulysses=2), Degrees(ulysses=2, ring=2)):
        ranks.run(degrees, "tests.dist.cases:unsliced_attention")


class Pretended(Group):
    """A rank of a group that is not there: shapes need no communication."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(0, 1, None, CPU)
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [(1,), (2, 1), (5, 3, 4), (7, 7, 7), (1, 1, 30)])
def test_slices_cover_every_token_once_and_local_segments_name_their_whole_ones(
    size: int, lengths: tuple[int, ...]
) -> None:
    segments = Segments.of(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    pieces, owners = [], []
    for rank in range(size):
        shards = TokenShards(segments.total, Pretended(rank, size))
        local = shards.local(segments)
        assert local.total == shards.length == len(shards.split(owner))
        pieces.append(shards.split(owner + 1))
        owners += [index for index, length in zip(local.indices, local.lengths, strict=True) for _ in range(length)]
        assert local.pick([f"s{i}" for i in range(len(lengths))]) == [f"s{i}" for i in local.indices]
    assert torch.equal(torch.cat(pieces)[: segments.total], owner + 1)
    assert owners[: segments.total] == owner.tolist()
    assert not torch.cat(pieces)[segments.total :].any()


@pytest.mark.parametrize(("size", "parts"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_norm_over_all_heads_is_that_of_one_process(ranks: Ranks, size: int, parts: int, bf16: bool) -> None:
    results = ranks.run(Degrees(tp=size), "tests.dist.cases:across_heads_norm", parts=parts, dim=48, bf16=bf16)
    x, weight = random_tensors(0, (7, parts, 48), (parts, 48), dtype=torch.bfloat16 if bf16 else torch.float32)
    expected = rms_normalize(x, 1e-6) * weight
    got = torch.cat([found["y"] for found in results], dim=-1)
    # One rounding of bf16 may fall to the other side.
    torch.testing.assert_close(got, expected, rtol=1e-2 if bf16 else 1e-6, atol=1e-6)
    for found in results:  # one float32 all-reduce for all parts
        assert found["sent"] == 2 * (size - 1) * -(-7 * parts // size) * 4


@pytest.mark.parametrize(("size", "hidden"), [(2, 34), (3, 48), (3, 51), (4, 4), (4, 132)])
def test_hidden_units_are_shared_out_whatever_their_number_is_aligned_to(
    ranks: Ranks, tmp_path: Path, size: int, hidden: int
) -> None:
    dim = 12
    shapes = {"gated.gate": (hidden, dim), "gated.up": (hidden, dim), "gated.down": (dim, hidden)}
    shapes |= {"plain.up": (hidden, dim), "plain.down": (dim, hidden)}
    weights = {f"{name}.weight": w for name, w in zip(shapes, random_tensors(1, *shapes.values()), strict=True)}
    weights |= {"plain.up.bias": random_tensors(2, (hidden,))[0], "plain.down.bias": random_tensors(3, (dim,))[0]}
    save_file(weights, tmp_path / "mlp.safetensors")
    case = {"file": str(tmp_path / "mlp.safetensors"), "dim": dim, "hidden": hidden}
    expected = feed_forward(Mesh.solo(), **case)
    for found in ranks.run(Degrees(tp=size), "tests.dist.cases:feed_forward", **case):
        for name, y in expected.items():
            torch.testing.assert_close(found[name], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [[2], [1], [2, 1, 1, 2], [1, 1], [1, 2, 2]])
def test_branches_are_computed_once_and_known_everywhere(ranks: Ranks, counts: list[int]) -> None:
    results = ranks.run(Degrees(cfg=2), "tests.dist.cases:branches", counts=counts)
    mine = [int(found["mine"]) for found in results]
    assert sum(mine) == sum(counts)
    assert mine[0] - mine[1] in (0, 1)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_tiles_are_shared_out_and_come_back_in_order(ranks: Ranks, count: int) -> None:
    ranks.run(Degrees(tp=2, ulysses=2), "tests.dist.cases:tiles", count=count)
