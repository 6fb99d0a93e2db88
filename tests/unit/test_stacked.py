"""Overlays side by side do what runs of them do, and leave the base's tokens as they are, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from multimodal_gen.nn.linear import FusedLinear, Linear
from multimodal_gen.nn.lowrank import Overlay, Piece, Routing, Update
from multimodal_gen.nn.stacked import Stack, StackedRouting

pytestmark = [pytest.mark.unit]

WIDTH = 24


def make(layers: dict[str, nn.Module], seed: int, rank: int, only: tuple[str, ...]) -> Overlay:
    """Random updates of some layers; those of the fused one have a part that is left alone, and share no factor."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    updates = {}
    for name in only:
        layer = layers[name]
        if isinstance(layer, FusedLinear):
            q, v = layer.extent("q").rows, layer.extent("v").rows
            pieces = (
                Piece(q, slice(0, rank), rand(rank, q.stop - q.start)),
                Piece(v, slice(rank, 2 * rank), rand(rank, v.stop - v.start)),
            )
            updates[layer] = Update(rand(WIDTH, 2 * rank), pieces)
        else:
            out = layer.get_parameter("weight").shape[0]
            updates[layer] = Update(rand(WIDTH, rank), (Piece(slice(0, out), slice(0, rank), rand(rank, out)),))
    return Overlay(updates)


@pytest.mark.parametrize("seed", range(5))
def test_a_stack_does_what_runs_do(seed: int):
    rng = random.Random(seed)
    layers: dict[str, nn.Module] = {
        "qkv": FusedLinear(WIDTH, {"q": 20, "k": 7, "v": 7}, multiple=16),
        "out": Linear(WIDTH, 10),
        "other": Linear(WIDTH, 5),
    }
    overlays = [make(layers, 1, 3, ("qkv", "out")), make(layers, 2, 1, ("out",)), make(layers, 3, 8, ("qkv",))]
    stack = Stack.of(overlays)
    lengths = [rng.randint(1, 4) for _ in range(9)]
    chosen = [rng.choice([-1, 0, 1, 2]) for _ in lengths]
    runs = Routing.of(lengths, [None if place < 0 else overlays[place] for place in chosen])
    places = [place for place, count in zip(chosen, lengths, strict=True) for _ in range(count)]
    owners = torch.tensor(places, dtype=torch.int32)
    stacked = StackedRouting(stack, owners)
    x = torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(seed))
    for layer in layers.values():
        y = torch.randn(len(x), layer.get_parameter("weight").shape[0])
        expected = y.clone() if runs is None else runs.add_(layer, x, y.clone())
        found = stacked.add_(layer, x, y.clone())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(found[owners < 0], y[owners < 0])


def test_bytes_are_counted():
    layer = Linear(WIDTH, 10)
    overlay = make({"out": layer}, 1, 4, ("out",))
    assert Stack.of([overlay]).nbytes == 4 * 4 * (WIDTH + 10)


def test_an_overlay_that_overflows_harms_no_tokens_but_its_own():
    layer = Linear(WIDTH, 10)
    mild, wild = make({"out": layer}, 1, 3, ("out",)), make({"out": layer}, 2, 2, ("out",))
    wild.updates[layer].down.fill_(3e38)
    owners, x = torch.tensor([-1, 0, 1], dtype=torch.int32), torch.ones(3, WIDTH)
    found = StackedRouting(Stack.of([mild, wild]), owners).add_(layer, x, torch.zeros(3, 10))
    expected = mild.updates[layer]
    assert torch.equal(found[0], torch.zeros(10))
    torch.testing.assert_close(found[1], (x[1] @ expected.down) @ expected.pieces[0].up)
    assert not found[2].isfinite().all()
