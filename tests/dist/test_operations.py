"""Groups of real processes: every operation, the bytes it counts, and what happens when a rank is gone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from multimodal_gen.errors import PeerLost
from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.group import SOLO
from multimodal_gen.parallel.mesh import Mesh
from tests.support.ranks import Ranks

pytestmark = [pytest.mark.dist]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_operation_and_the_bytes_that_it_counts(ranks: Ranks, size: int) -> None:
    results = ranks.run(Degrees(ring=size), "tests.dist.cases:operations")
    own = [torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(size)]
    blocks = [torch.arange(2.0 * size).view(-1, 2) + 100 * rank for rank in range(size)]
    strided = sum(torch.arange(12.0).view(3, 4).T + rank for rank in range(size))
    for rank, found in enumerate(results):
        assert torch.equal(found["all_reduce"], sum(own))
        assert torch.equal(found["all_reduce_strided"], strided)
        assert torch.equal(found["all_reduce_bf16"], sum(x.bfloat16() for x in own))
        assert torch.equal(found["all_gather"], torch.cat(own))
        assert torch.equal(found["all_to_all"], torch.stack([block[rank] for block in blocks]))
        assert torch.equal(found["broadcast"], own[-1])
        assert torch.equal(found["shift"], own[rank - 1])
        sizes = [(6, 4), (12, 4), (6, 2), (1, 4)]  # elements and bytes of each: two of float32, bf16, the barrier
        assert found["sent_all_reduce"] == sum(2 * (size - 1) * -(-n // size) * width for n, width in sizes[:3])
        assert found["sent_all_gather"] == (size - 1) * 24
        assert found["sent_all_to_all"] == (size - 1) * 8
        assert found["sent_shift"] == 24
        if rank == size - 1:
            assert found["sent_broadcast"] == (size - 1) * 24
        else:
            assert "sent_broadcast" not in found


def test_control_messages_of_every_length(ranks: Ranks) -> None:
    ranks.run(Degrees(tp=3), "tests.dist.cases:control_messages")


def test_who_is_with_whom(ranks: Ranks) -> None:
    degrees = Degrees(tp=2, ulysses=1, ring=2)
    results = ranks.run(degrees, "tests.dist.cases:places")
    tp, ring = [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]
    for rank, found in enumerate(results):
        assert found["world"].tolist() == found["control"].tolist() == [0, 1, 2, 3]
        assert found["tp"].tolist() == tp[rank]
        assert found["ring"].tolist() == found["sp"].tolist() == ring[rank]
        assert found["ulysses"].tolist() == found["cfg"].tolist() == [rank]


def test_ranks_of_one_sequence_are_ordered_as_the_tokens_are(ranks: Ranks) -> None:
    results = ranks.run(Degrees(ulysses=2, ring=2), "tests.dist.cases:places")
    for rank, found in enumerate(results):
        assert found["sp"].tolist() == [0, 1, 2, 3]
        assert found["ulysses"].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]][rank]
        assert found["ring"].tolist() == [[0, 2], [1, 3], [0, 2], [1, 3]][rank]


def test_what_fails_on_one_rank_fails_on_all(ranks: Ranks) -> None:
    ranks.run(Degrees(tp=3), "tests.dist.cases:agreement")


def test_a_rank_that_is_gone_is_an_error_of_the_others_at_once() -> None:
    # They end themselves when content.
    with Ranks(3) as own, pytest.raises(AssertionError, match=r"rank [012]: it died"):
        own.run(Degrees(tp=3), "tests.dist.cases:lost")


def test_a_rank_that_does_not_come_is_an_error_in_time(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    started = time.monotonic()
    with pytest.raises(PeerLost, match="meeting the ranks of group world/0"):
        Mesh.connect(Degrees(tp=2), 0, store, torch.device("cpu"), timeout_s=1.0)
    assert time.monotonic() - started < 10


def test_ranks_of_one_host_listen_where_no_other_host_can_reach_them(ranks: Ranks) -> None:
    """Gloo knows no passwords."""
    for found in ranks.run(Degrees(tp=2), "tests.dist.cases:listening"):
        assert found["elsewhere"] == 0
        assert found["loopback"] > 0


def test_a_rank_alone_sends_nothing() -> None:
    mesh = Mesh.solo()
    x = torch.arange(4.0)
    assert mesh.groups == {}
    for operation in (SOLO.all_reduce_, SOLO.all_gather, SOLO.all_to_all, SOLO.shift):
        assert operation(x) is x
    assert SOLO.broadcast_bytes(b"x", 0) == b"x"
    assert SOLO.all_gather_bytes(b"x") == [b"x"]
    assert not SOLO.sent


def test_coordinates_are_a_numbering() -> None:
    degrees = Degrees(tp=2, ulysses=3, ring=2, cfg=2)
    assert [degrees.rank(degrees.coordinates(rank)) for rank in range(24)] == list(range(24))
    assert str(degrees) == "tp 2 x ulysses 3 x ring 2 x cfg 2"
    assert str(Degrees()) == "one rank"
