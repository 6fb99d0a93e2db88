"""What ranks compute in these tests; each function runs on every rank of a mesh."""

from __future__ import annotations

import random
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from multimodal_gen.attention import registry
from multimodal_gen.attention.segments import Segments
from multimodal_gen.errors import PathNotAllowed, PeerLost
from multimodal_gen.nn.mlp import GeluMLP, SwiGLU
from multimodal_gen.nn.norm import AcrossHeadsRMSNorm
from multimodal_gen.parallel.agreement import agree
from multimodal_gen.parallel.branches import BranchShare
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.parallel.sequence import TokenShards, choose_attention
from multimodal_gen.parallel.tensor import COLUMN, HEADS, ROW, Rule, shard
from multimodal_gen.pipelines.vaes.tiles import decode_shared
from multimodal_gen.weights.loading import Rename, allocate, construction
from tests.support.weights import load_weights

CPU = torch.device("cpu")


def random_tensors(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same on every rank and in the test."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def operations(mesh: Mesh) -> dict[str, Tensor]:
    """Every operation of a group, on tensors that name their rank."""
    group = mesh.world
    own = torch.arange(6.0).view(2, 3) + 10 * group.rank
    blocks = torch.arange(2.0 * group.size).view(-1, 2) + 100 * group.rank
    strided = torch.arange(12.0).view(3, 4).T + group.rank
    found = {
        "all_reduce": group.all_reduce_(own.clone()),
        "all_reduce_strided": group.all_reduce_(strided),
        "all_reduce_bf16": group.all_reduce_(own.bfloat16()),
        "all_gather": group.all_gather(own),
        "all_to_all": group.all_to_all(blocks),
        "broadcast": group.broadcast_(own.clone(), source=group.size - 1),
        "shift": group.shift(own),
    }
    group.barrier()
    sent = {f"sent_{name}": torch.tensor(count) for name, count in group.sent.items()}
    return found | sent


def control_messages(mesh: Mesh) -> dict[str, Tensor]:
    """Bytes of every length, empty ones too."""
    group = mesh.control
    for length in (0, 1, 70_000):
        data = bytes(range(256)) * (length // 256 + 1)
        data = data[:length]
        assert group.broadcast_bytes(data if group.rank == 1 else None, source=1) == data
    lengths = [rank * 1000 for rank in range(group.size)]
    assert [len(m) for m in group.all_gather_bytes(b"x" * lengths[group.rank])] == lengths
    assert group.all_gather_bytes(b"") == [b""] * group.size
    return {}


def listening(mesh: Mesh) -> dict[str, Tensor]:
    """How many TCP ports this process has open on loopback, and elsewhere."""
    mesh.world.barrier()
    sockets = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    elsewhere = [c for c in sockets if c.laddr.ip != "127.0.0.1"]
    return {"elsewhere": torch.tensor(len(elsewhere)), "loopback": torch.tensor(len(sockets) - len(elsewhere))}


def places(mesh: Mesh) -> dict[str, Tensor]:
    """Who is with whom: all ranks of each of this rank's groups."""
    own = torch.tensor([mesh.rank])
    names = ("world", "control", "tp", "ulysses", "ring", "sp", "cfg")
    return {name: vars(mesh)[name].all_gather(own) for name in names}


def agreement(mesh: Mesh) -> dict[str, Tensor]:
    """One rank's error is every rank's."""
    agree(mesh.control, None)
    own = PathNotAllowed("not here") if mesh.rank == 1 else None
    try:
        agree(mesh.control, own)
    except PathNotAllowed as error:
        assert error.message == "not here"  # noqa: PT017 - this is a rank, not a test
    else:
        raise AssertionError("rank 1 failed and this rank has not heard of it")
    return {}


def lost(mesh: Mesh) -> dict[str, Tensor]:
    """A rank that leaves is an error of the others, in every kind of operation."""
    import os
    import time

    if mesh.rank == 1:
        os._exit(0)
    x = torch.ones(4)
    started = time.monotonic()
    for operation in (mesh.world.all_reduce_, mesh.world.all_gather, mesh.world.all_to_all, mesh.world.shift):
        try:
            operation(x.clone())
        except PeerLost as error:
            assert "127.0.0.1" not in error.message  # noqa: PT017
        else:
            raise AssertionError(f"{operation.__name__} did not notice")
    assert time.monotonic() - started < 10
    os._exit(0)


def across_heads_norm(mesh: Mesh, parts: int, dim: int, bf16: bool) -> dict[str, Tensor]:
    """The local share of an RMS norm over all heads."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, weight = random_tensors(0, (7, parts, dim), (parts, dim), dtype=dtype)
    with construction(torch.device("meta"), dtype):
        model = nn.Sequential(AcrossHeadsRMSNorm(("q", "k")[:parts], dim, 1e-6))
    shard(model, (Rule("0", HEADS),), mesh.tp)
    allocate(model, CPU)
    norm = model[0]
    cut = slice(mesh.tp.rank * dim // mesh.tp.size, (mesh.tp.rank + 1) * dim // mesh.tp.size)
    assert isinstance(norm, AcrossHeadsRMSNorm)
    norm.weight.copy_(weight[:, cut])
    before = mesh.tp.sent["all_reduce"]
    y = norm(x[..., cut].unflatten(-1, (2, -1)).contiguous()).flatten(2)
    return {"y": y, "sent": torch.tensor(mesh.tp.sent["all_reduce"] - before)}


def feed_forward(mesh: Mesh, file: str, dim: int, hidden: int) -> dict[str, Tensor]:
    """A gated MLP and one with biases, their hidden widths shared out whatever they are aligned to."""
    with construction(torch.device("meta"), torch.float32):
        model = nn.ModuleDict({"gated": SwiGLU(dim, hidden), "plain": GeluMLP(dim, hidden, dim, "tanh")})
    table = (Rule(r"gated\.gate_up|plain\.up", COLUMN), Rule(r".+\.down", ROW))
    shard(model, table, mesh.tp)
    allocate(model, CPU)
    load_weights(model, [Path(file)], (Rename(r"gated\.(gate|up)\.weight", "gated.gate_up.weight", r"\1"),))
    (x,) = random_tensors(5, (7, dim))
    return {name: layer(x) for name, layer in model.items()}


def attention_case(number: int, sp: int) -> tuple[Segments, int, torch.dtype]:
    """Lengths that cross the borders of slices, are shorter than a slice, leave ranks without a token, …"""
    fixed = [(1,), (2,), (3, 1), (1, 1, 1, 1, 1), (17,), (5, 5, 5, 5), (40, 1, 1), (1, 1, 40), (sp,), (sp + 1,)]
    if number < len(fixed):
        return Segments.of(fixed[number]), 4, torch.float32
    dice = random.Random(number)
    lengths = [dice.randint(1, dice.choice((3, 30, 90))) for _ in range(dice.randint(1, 9))]
    return Segments.of(lengths), dice.choice((4, 8, 12)), dice.choice((torch.float32, torch.bfloat16))


def attention_inputs(number: int, sp: int) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """q, k, v [T, H, D] and the segments of a case."""
    segments, heads, dtype = attention_case(number, sp)
    q, k, v = random_tensors(number, *[(segments.total, heads, 16)] * 3, dtype=dtype)
    return q, k, v, segments


def attention(mesh: Mesh, backend: str, cases: int) -> dict[str, Tensor]:
    """The gathered result of every case."""
    attend = choose_attention(backend, CPU, mesh)
    found = {}
    for number in range(cases):
        q, k, v, segments = attention_inputs(number, mesh.sp.size)
        shards = TokenShards(segments.total, mesh.sp)
        local = shards.local(segments)
        out = attend(shards.split(q), shards.split(k), shards.split(v), local)
        assert len(out) == shards.length == local.total
        found[str(number)] = shards.gather(out)
    return found


def unsliced_attention(mesh: Mesh) -> dict[str, Tensor]:
    """Segments that are not sliced stay on the rank: no communication."""
    q, k, v = random_tensors(0, *[(9, 4, 16)] * 3)
    before = sum(sum(group.sent.values()) for group in mesh.groups.values())
    out = choose_attention("sdpa", CPU, mesh)(q, k, v, Segments.of([4, 5]))
    assert before == sum(sum(group.sent.values()) for group in mesh.groups.values())
    expected = registry.choose("sdpa", CPU)(q, k, v, Segments.of([4, 5]))
    assert torch.equal(out, expected)
    return {}


def branches(mesh: Mesh, counts: list[int]) -> dict[str, Tensor]:
    """Every branch of every row, computed once and known everywhere."""
    share = BranchShare(tuple(counts), mesh.cfg)
    shapes = [torch.Size((row + 2, 3)) for row in range(len(counts))]
    mine = {(row, branch): torch.full(shapes[row], 10.0 * row + branch) for row, branch in share.mine}
    found = share.exchange(mine, shapes, torch.empty(0))
    assert set(found) == {(row, branch) for row, count in enumerate(counts) for branch in range(count)}
    assert all(torch.equal(x, torch.full(shapes[row], 10.0 * row + b)) for (row, b), x in found.items())
    return {"mine": torch.tensor(len(share.mine))}


def tiles(mesh: Mesh, count: int) -> dict[str, Tensor]:
    """Tiles of several shapes, fewer and more than ranks."""
    latents = random_tensors(count, *[(1, 2, 3 + index % 3, 4) for index in range(count)])
    decoded = decode_shared(latents, lambda tile: tile.repeat_interleave(2, dim=3) * 3, mesh.world, latents[0])
    assert len(decoded) == count
    for tile, pixels in zip(latents, decoded, strict=True):
        assert torch.equal(pixels, tile.repeat_interleave(2, dim=3) * 3)
    return {}
