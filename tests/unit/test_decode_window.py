"""The dense copies that decoding attends over say what the pages say, whoever comes, grows, pauses and leaves."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from multimodal_gen.attention.cached import WindowedAttention
from multimodal_gen.attention.decode_window import DecodeWindow
from multimodal_gen.attention.paged import paged_attention
from multimodal_gen.llm.batch import Batch, Span

pytestmark = [pytest.mark.unit]

LAYERS, HEADS, KV_HEADS, DIM, PAGE, PAGES = 2, 6, 3, 16, 8, 300
CPU = torch.device("cpu")


@dataclass
class Known:
    want: int
    length: int = 0
    pages: list[int] = field(default_factory=list)


class World:
    """Random sequences over one pool of pages."""

    def __init__(self, seed: int, dtype: torch.dtype, window_bytes: int) -> None:
        self.rng, self.dtype = random.Random(seed), dtype
        self.pool = [torch.zeros(2, PAGES, KV_HEADS, PAGE, DIM, dtype=dtype) for _ in range(LAYERS)]
        self.window = DecodeWindow(LAYERS, KV_HEADS, DIM, dtype)
        self.attention = WindowedAttention(self.pool, self.window, window_bytes)
        self.free = self.rng.sample(range(PAGES), PAGES)
        self.known: dict[int, Known] = {}
        self.made = 0

    def spans(self) -> list[Span]:
        """One step: some arrive, some leave and give their pages to others, some pause, the rest go on."""
        if len(self.known) < 7 and self.rng.random() < 0.5:
            self.known[self.made] = Known(self.rng.randint(1, 150))
            self.made += 1
        for owner in [owner for owner in self.known if self.rng.random() < 0.04]:
            self.free += self.known.pop(owner).pages
        self.rng.shuffle(self.free)
        spans = []
        for owner, one in self.known.items():
            if self.rng.random() < 0.1:
                continue
            count = 1 if one.length else one.want
            while len(one.pages) * PAGE < one.length + count:
                one.pages.append(self.free.pop())
            spans.append(Span([0] * count, one.length, list(one.pages), 1, owner))
            one.length += count
        return sorted(spans, key=lambda span: len(span.ids) > 1)

    def step(self) -> float:
        """Largest difference of one forward from the reference."""
        spans, worst = self.spans(), 0.0
        if not spans:
            return worst
        batch = Batch.of(spans, PAGE, CPU)
        plan = self.attention.begin(spans, batch.slots)
        for layer in range(LAYERS):
            q, k, v = (torch.randn(batch.tokens, heads, DIM, dtype=self.dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
            found = self.attention(layer, q, k, v, plan)
            want = paged_attention(q.float(), self.pool[layer].float(), spans)
            worst = max(worst, float((found.float() - want).abs().max()))
        return worst


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("window_bytes", [1 << 30, 150_000, 0], ids=["all fit", "some fit", "none fits"])
def test_a_step_attends_as_the_reference_does(seed: int, dtype: torch.dtype, limit: float, window_bytes: int) -> None:
    torch.manual_seed(seed)
    world = World(seed, dtype, window_bytes)
    assert max(world.step() for _ in range(80)) <= limit


def test_the_copies_take_no_more_than_they_may() -> None:
    torch.manual_seed(0)
    world = World(1, torch.bfloat16, 150_000)
    for _ in range(120):
        world.step()
        assert world.window.nbytes <= 2 * 150_000  # rows double when they grow
    assert world.window.nbytes > 0
    world.window.clear()
    assert world.window.nbytes == 0


def test_a_row_of_a_large_batch_is_what_it_is_alone() -> None:
    torch.manual_seed(0)
    pool = [torch.randn(2, PAGES, KV_HEADS, PAGE, DIM)]
    spans = [Span([0], 20 + 9 * i, range(12 * i, 12 * i + 12), 1, i) for i in range(8)]
    q, k, v = (torch.randn(8, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def attend(picked: list[int]) -> torch.Tensor:
        attention = WindowedAttention([pool[0].clone()], DecodeWindow(1, KV_HEADS, DIM, torch.float32), 1 << 30)
        chosen = [spans[i] for i in picked]
        batch = Batch.of(chosen, PAGE, CPU)
        return attention(0, q[picked], k[picked], v[picked], attention.begin(chosen, batch.slots))

    together = attend(list(range(8)))
    for i in range(8):
        torch.testing.assert_close(attend([i])[0], together[i], atol=1e-6, rtol=1e-5)
