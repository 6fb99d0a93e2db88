"""Shared layers against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multimodal_gen.attention.segments import Segments
from multimodal_gen.nn import precision
from multimodal_gen.nn.linear import FusedLinear, Linear
from multimodal_gen.nn.mlp import SwiGLU
from multimodal_gen.nn.norm import PartedRMSNorm, RMSNorm
from multimodal_gen.nn.rope import axis_turns

pytestmark = [pytest.mark.unit]

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_fused_linear_is_its_parts_side_by_side():
    layer, weights = FusedLinear(8, {"a": 5, "b": 3}, multiple=4), {"a": torch.randn(5, 8), "b": torch.randn(3, 8)}
    for name, weight in weights.items():
        layer.slot(name).copy_(weight)
    x = torch.randn(7, 8)
    y = layer(x)
    assert y.shape == (7, 12)
    torch.testing.assert_close(y[:, :5], x @ weights["a"].T)
    torch.testing.assert_close(y[:, 8:11], x @ weights["b"].T)
    assert y[:, 5:8].abs().max() == 0
    assert y[:, 11:].abs().max() == 0


@pytest.mark.parametrize("hidden", [16, 37])
def test_swiglu_with_an_aligned_hidden_width_is_the_plain_formula(hidden):
    layer = SwiGLU(12, hidden)
    gate, up, down = torch.randn(hidden, 12), torch.randn(hidden, 12), torch.randn(12, hidden)
    layer.gate_up.slot("gate").copy_(gate)
    layer.gate_up.slot("up").copy_(up)
    layer.down.slot(None).copy_(down)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)


def test_bf16_on_a_cpu_that_emulates_it_is_multiplied_in_float32(monkeypatch):
    monkeypatch.setattr(precision, "native_bf16", lambda device: False)
    layer = Linear(64, 32, bias=True).to(torch.bfloat16)
    layer.weight.copy_(torch.randn(32, 64))
    layer.bias.copy_(torch.randn(32))
    x = torch.randn(9, 64).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = F.linear(x.float(), layer.weight.float(), layer.bias.float()).bfloat16()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_auto_dtype_asks_the_processor(monkeypatch):
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "native_bf16", lambda device, native=native: native)
        assert precision.resolve_dtype("auto", CPU) == dtype
        assert precision.resolve_dtype("float32", CPU) == torch.float32


def test_rms_norms():
    x = torch.randn(6, 2, 3, 8)
    norm = PartedRMSNorm(("q", "k"), 8, 1e-5)
    norm.slot("q").copy_(torch.randn(8))
    norm.slot("k").copy_(torch.randn(8))
    normed = norm(x.clone())
    for part, name in enumerate(("q", "k")):
        single = RMSNorm(8, 1e-5)
        single.weight.copy_(norm.slot(name))
        y = x[:, part]
        expected = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.slot(name)
        torch.testing.assert_close(normed[:, part], expected)
        torch.testing.assert_close(single(y.flatten(0, 1)), expected.flatten(0, 1))


def test_turns_are_those_of_each_axis_one_after_another():
    positions = torch.tensor([[3, 0], [1, 7]])
    turns = axis_turns(positions, (4, 2), 100.0)
    angles = torch.tensor([[p * 1.0, p * 100.0**-0.5, q * 1.0] for p, q in positions.tolist()])
    assert turns.dtype == torch.float32
    torch.testing.assert_close(turns, torch.stack((angles.cos(), angles.sin()), 1))


def test_every_token_knows_its_segment():
    index = Segments.of([2, 2, 3, 1]).index(CPU)
    assert index.dtype == torch.int32
    assert index.tolist() == [0, 0, 1, 1, 2, 2, 2, 3]


def test_segments_group_equal_neighbours_only():
    runs = Segments.of([4, 4, 2, 4]).runs
    assert [(run.first, run.last, run.start, run.length) for run in runs] == [(0, 2, 0, 4), (2, 3, 8, 2), (3, 4, 10, 4)]
