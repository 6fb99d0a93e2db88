"""Calls of compiled kernels that are recorded and made again as one: the same numbers, bit for bit."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal_gen.attention.native import NativeAttention
from multimodal_gen.attention.segments import Segments
from multimodal_gen.kernels import blocked_linear, native
from multimodal_gen.kernels.blocked_linear import BlockedWeight
from multimodal_gen.kernels.eager import eager_break
from multimodal_gen.kernels.gated_product import gelu_tanh_
from multimodal_gen.kernels.norm_modulate import layer_norm_scale_shift
from multimodal_gen.nn.cpu_graphs import LARGEST, CpuRecorder, Pool
from multimodal_gen.nn.forms import choose, filled
from multimodal_gen.nn.graphs import Graphs
from multimodal_gen.pipelines.zimage.model import Block, ZImageConfig

pytestmark = [pytest.mark.kernels]

WIDTH, LENGTHS = 96, (40, 33, 7)
CONFIG = ZImageConfig(4, WIDTH, 2, 1, 3, 1e-5, 20, 256.0, 1000.0, (8, 12, 12), 2)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _as_a_server_computes() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def layers(dtype: torch.dtype, weights: torch.dtype | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Two blocks whose products are our own kernel's: x [80, 96], folded [2, 4, 3, 96] → x."""
    if why := native.unavailable() or NativeAttention.unavailable(torch.device("cpu")):
        pytest.skip(why)
    if why := blocked_linear.unavailable((WIDTH, WIDTH), weights or dtype, dtype):
        pytest.skip(why)
    blocks = [Block(CONFIG, NativeAttention()).to(dtype) for _ in range(2)]
    for block in blocks:
        for parameter in block.parameters():
            parameter.copy_(made(*parameter.shape) / parameter.shape[-1] ** 0.5)
        feed = block.feed_forward
        for layer in (block.attention.qkv, block.attention.out, feed.gate_up, feed.down):
            layer.packed = BlockedWeight(layer.weight.detach(), weights or dtype, halves=layer is feed.gate_up)
    segments, turns = Segments.of(LENGTHS), made(sum(LENGTHS), 2, WIDTH // 3 // 2)

    def compute(x: Tensor, folded: Tensor) -> Tensor:
        for block, own in zip(blocks, folded, strict=True):
            x = block(x, turns, segments, None, own)
        return x

    return compute


def inputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return made(sum(LENGTHS), WIDTH, seed=seed, dtype=dtype), 1 + made(2, 4, 3, WIDTH, seed=seed, dtype=dtype) / 4


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weights", [None, torch.int8], ids=["all bits", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replayed_blocks_give_the_bits_that_their_calls_give(
    dtype: torch.dtype, weights: torch.dtype | None, threads: int
) -> None:
    compute, graphs, layout = layers(dtype, weights), Graphs(CpuRecorder()), object()
    torch.set_num_threads(threads)
    for seed in (1, 2, 3, 2):
        x, folded = inputs(seed, dtype)
        wanted = compute(x.clone(), folded)
        assert not torch.equal(wanted, x)
        noise = [torch.full_like(x, torch.nan) for _ in range(8)]  # in memory that was free when it was recorded
        found = graphs.run(compute, (x, folded), (0,), (layout,))
        assert found is x
        assert torch.equal(found, wanted)
        del noise
    assert graphs.replayed == 3  # all but the first


def test_the_team_may_grow_and_shrink_between_replays() -> None:
    compute, graphs, layout = layers(torch.float32), Graphs(CpuRecorder()), object()
    wanted = compute(*inputs(1, torch.float32))
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        assert torch.equal(graphs.run(compute, inputs(1, torch.float32), (0,), (layout,)), wanted)


def test_other_kernels_that_blocks_call_replay_too() -> None:
    if why := native.unavailable():
        pytest.skip(why)
    scale, bias, recorder = made(1, 50), made(50, seed=1), CpuRecorder()

    def compute(x: Tensor) -> Tensor:
        return gelu_tanh_(layer_norm_scale_shift(x, scale, scale, None, 1e-6), bias)

    recording = recorder.record(compute, [made(9, 50)])
    assert not recording.obstacles
    assert torch.equal(recording.replay([made(9, 50, seed=5)]), compute(made(9, 50, seed=5)))


def test_threads_record_their_own_calls() -> None:
    compute = layers(torch.float32)
    started = threading.Barrier(2)

    def one(seed: int) -> list[Tensor]:
        with torch.inference_mode():
            graphs = Graphs(CpuRecorder())
            started.wait()
            return [graphs.run(compute, inputs(seed, torch.float32), (0,), ()).clone() for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(one, (1, 2)))
    for seed, found in zip((1, 2), both, strict=True):
        wanted = compute(*inputs(seed, torch.float32))
        assert all(torch.equal(x, wanted) for x in found)


@eager_break
def talks(x: Tensor) -> Tensor:
    """As a collective does: behind torch's back."""
    said.append(len(x))
    return x


said: list[int] = []
SCALE = made(1, 32)
OBSTACLES: dict[str, Callable[[Tensor], Tensor]] = {
    "an operation of torch": lambda x: x.add_(1),
    "one that copies": lambda x: layer_norm_scale_shift(x.T.reshape(x.shape), SCALE, None, None, 1e-6),
    "a number that is looked at": lambda x: x.mul_(x[0, 0].item()),
    "a call that must not be left out": talks,
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_is_no_call_of_ours_runs_as_always(name: str) -> None:
    compute, graphs = OBSTACLES[name], Graphs(CpuRecorder())
    said.clear()
    for seed in range(3):
        x = made(4, 32, seed=seed)
        wanted = compute(x.clone())
        assert torch.equal(graphs.run(compute, (x,), (0,), ()), wanted)
    assert graphs.replayed == 0
    assert len(said) in (0, 6)


def test_large_work_is_not_recorded() -> None:
    graphs, x = Graphs(CpuRecorder()), torch.zeros(LARGEST // 4 + 1)
    for _ in range(3):
        graphs.run(lambda x: x.add_(1), (x,), (0,), ())
    assert x[0] == 3
    assert not graphs.entries


def test_a_check_is_made_again_after_every_replay() -> None:
    if why := native.unavailable():
        pytest.skip(why)
    broken = [False]

    def look() -> None:
        if broken[0]:
            raise MemoryError("no memory")

    def compute(x: Tensor) -> Tensor:
        y = layer_norm_scale_shift(x, SCALE, None, None, 1e-6)
        native.check(look)
        return y

    graphs = Graphs(CpuRecorder())
    for _ in range(2):
        graphs.run(compute, (made(4, 32),), (0,), ())
    assert graphs.replayed == 1
    broken[0] = True
    with pytest.raises(MemoryError, match="no memory"):
        graphs.run(compute, (made(4, 32),), (0,), ())


def test_a_recording_that_fails_is_tried_again() -> None:
    fails, graphs = [True], Graphs(CpuRecorder())

    def compute(x: Tensor) -> Tensor:
        if fails[0]:
            raise RuntimeError("no")
        return x.add_(1)

    with pytest.raises(RuntimeError, match="no"):
        graphs.run(compute, (torch.zeros(3),), (0,), ())
    fails[0] = False
    assert torch.equal(graphs.run(compute, (torch.zeros(3),), (0,), ()), torch.ones(3))


def test_memory_comes_back_when_nothing_looks_at_it_and_is_used_again() -> None:
    pool = Pool()
    first = pool.lend(5000)
    view = first.view(torch.int32)[7:]
    address = first.data_ptr()
    del first
    gc.collect()
    assert pool.lend(5000).data_ptr() != address, "a view still looks at it"
    del view
    gc.collect()
    found = {pool.lend(100).data_ptr() for _ in range(5)}  # each let go of before the next
    assert pool.nbytes <= 2 * 8192
    assert len(found) == 1


def test_many_recordings_hold_hardly_more_memory_than_one() -> None:
    compute, recorder = layers(torch.float32), CpuRecorder()
    recordings = [recorder.record(compute, inputs(1, torch.float32)) for _ in range(4)]
    assert not recordings[0].obstacles
    one = CpuRecorder()
    alone = one.record(compute, inputs(1, torch.float32))
    assert not alone.obstacles
    assert recorder._pool.nbytes == one._pool.nbytes


def test_layers_take_our_own_products_where_they_can_be_had() -> None:
    if why := blocked_linear.unavailable((WIDTH, WIDTH), torch.bfloat16, torch.bfloat16):
        pytest.skip(why)
    block = Block(CONFIG, NativeAttention()).to(torch.bfloat16)
    forms = choose(block, torch.device("cpu"), lambda *_: None, ())
    losses: dict[Any, float] = {}
    for layer, form in forms.items():
        weight = made(*layer.weight.shape, dtype=torch.bfloat16)
        with filled(layer, form, losses):
            layer.weight.copy_(weight)
        assert isinstance(layer.packed, BlockedWeight)
        assert torch.equal(layer.packed.plain(), weight)
        assert layer.packed.halves == (layer is block.feed_forward.gate_up)
    assert len(forms) == 5
    assert not losses
