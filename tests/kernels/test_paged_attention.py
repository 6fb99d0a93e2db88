"""Attention straight over pages against its reference: any lengths, in any pages, whatever others left in theirs."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

from multimodal_gen.kernels import native, paged_attention
from multimodal_gen.kernels.paged_attention import Spans

pytestmark = [pytest.mark.kernels]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
PAGES = 90
SHAPES = [(9, 3, 64, 16), (4, 4, 32, 1), (8, 1, 128, 7), (40, 1, 64, 16), (6, 2, 96, 3), (2, 2, 256, 8)]
CHUNKS = [(0, 1), (5, 1), (16, 1), (300, 1), (0, 13), (9, 23), (31, 1), (250, 40)]  # tokens before, new tokens


class NewTokens(NamedTuple):
    start: int
    stop: int
    pages: list[int]


def spans_of(page_size: int) -> list[NewTokens]:
    """As many of CHUNKS as there are pages for, in random ones."""
    free = random.Random(page_size).sample(range(PAGES), PAGES)
    made = []
    for start, count in CHUNKS:
        need = -(-(start + count) // page_size)
        if need <= len(free):
            made.append(NewTokens(start, start + count, [free.pop() for _ in range(need)]))
    return made


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if native.unavailable():
        pytest.skip(native.unavailable())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_computes_its_reference_and_reads_no_other_token(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    heads, kv_heads, dim, page_size = shape
    assert not paged_attention.unavailable(dim, dtype)
    torch.manual_seed(heads)
    made = spans_of(page_size)
    cache = torch.full((2, PAGES, kv_heads, page_size, dim), torch.nan, dtype=dtype)
    for span in made:
        for at in range(span.stop):
            place = (slice(None), span.pages[at // page_size], slice(None), at % page_size)
            cache[place] = torch.randn(2, kv_heads, dim).to(dtype)
    tokens = sum(span.stop - span.start for span in made)
    q = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype)[:, :heads]  # as it lies beside keys and values
    spans = Spans.of(made, page_size)
    found, wanted = (way(q, cache, spans) for way in (paged_attention.paged_attention, paged_attention.reference))
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_large_scores_are_not_rounded_before_the_softmax() -> None:
    torch.manual_seed(0)
    cache, spans = torch.randn(2, 4, 1, 16, 64).bfloat16(), Spans.of([NewTokens(63, 64, [2, 0, 3, 1])], 16)
    q = 40 * torch.randn(1, 1, 64).bfloat16()
    found, wanted = (way(q, cache, spans) for way in (paged_attention.paged_attention, paged_attention.reference))
    torch.testing.assert_close(found, wanted, rtol=1.6e-2, atol=1e-3)


def test_no_tokens_are_no_work() -> None:
    cache = torch.zeros(2, 1, 1, 16, 32)
    assert paged_attention.paged_attention(torch.zeros(0, 2, 32), cache, Spans.of([], 16)).shape == (0, 2, 32)


def test_heads_that_it_has_no_vectors_for_are_computed_by_the_reference() -> None:
    assert "24 wide" in paged_attention.unavailable(24, torch.float32)
    q, cache, spans = torch.randn(1, 2, 24), torch.randn(2, 1, 2, 16, 24), Spans.of([NewTokens(3, 4, [0])], 16)
    found = paged_attention.paged_attention(q, cache, spans)
    assert torch.equal(found, paged_attention.reference(q, cache, spans))
