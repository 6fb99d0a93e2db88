"""The dense copies that decoding attends over say what the pages say, whoever comes, grows, pauses and leaves."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from multimodal_gen.attention.paged import paged_attention
from multimodal_gen.attention.windowed import Windowed
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
        self.attention = Windowed(window_bytes)
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
        attend = self.attention.plan(batch, self.pool)
        for layer in range(LAYERS):
            q, k, v = (torch.randn(batch.tokens, heads, DIM, dtype=self.dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
            kv = write(self.pool[layer], k, v, batch)
            found = attend(layer, q, kv)
            want = paged_attention(q.float(), self.pool[layer].float(), spans)
            worst = max(worst, float((found.float() - want).abs().max()))
        return worst


def write(pool: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Put new keys and values into their pages; → [T, 2, Hkv, D]."""
    kv, (page, offset) = torch.stack((k, v), 1), batch.slots_at
    pool[:, page, :, offset] = kv
    return kv


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
        assert world.attention.nbytes <= 2 * 150_000  # rows are given back when half of them are empty
    assert world.attention.nbytes > 0
    world.attention.clear()
    assert world.attention.nbytes == 0


def test_a_row_of_a_large_batch_is_what_it_is_alone() -> None:
    torch.manual_seed(0)
    pool = [torch.randn(2, PAGES, KV_HEADS, PAGE, DIM)]
    spans = [Span([0], 20 + 9 * i, range(12 * i, 12 * i + 12), 1, i) for i in range(8)]
    q, k, v = (torch.randn(8, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def attend(picked: list[int]) -> torch.Tensor:
        batch = Batch.of([spans[i] for i in picked], PAGE, CPU)
        attend = Windowed(1 << 30).plan(batch, pool)
        return attend(0, q[picked], write(pool[0], k[picked], v[picked], batch))

    together = attend(list(range(8)))
    for i in range(8):
        torch.testing.assert_close(attend([i])[0], together[i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window_bytes", [1 << 30, 0], ids=["in copies", "in pages"])
def test_numbers_that_overflowed_harm_nobody_who_gets_their_memory(window_bytes: int) -> None:
    torch.manual_seed(0)
    pool, attention = [torch.randn(2, PAGES, KV_HEADS, PAGE, DIM)], Windowed(window_bytes)

    def step(spans: list[Span], spoilt: int | None = None) -> torch.Tensor:
        batch = Batch.of(spans, PAGE, CPU)
        attend = attention.plan(batch, pool)
        q, k, v = (torch.randn(len(spans), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        if spoilt is not None:
            k[spoilt], v[spoilt] = torch.inf, torch.nan
        found = attend(0, q, write(pool[0], k, v, batch))
        keep = [at for at in range(len(spans)) if at != spoilt]
        want = paged_attention(q[keep], pool[0], [spans[at] for at in keep])
        torch.testing.assert_close(found[keep], want, atol=1e-5, rtol=1e-5)
        return found

    bad, other = range(8), range(8, 16)
    step([Span([0], 62, bad, 1, 0), Span([0], 40, other, 1, 1)], spoilt=0)
    step([Span([0], 41, other, 1, 1)])  # has the first row now
    # Of a sequence that has a row, and the pages, of the one that is gone.
    step([Span([0], 42, other, 1, 1), Span([0], 57, bad, 1, 2)])
