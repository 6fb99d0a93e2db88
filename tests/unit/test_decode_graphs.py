"""Recorded steps of decoding write what they write without graphs, whatever stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.attention.paged import Attend
from multimodal_gen.kernels import native
from multimodal_gen.llm.batch import Batch, Span
from multimodal_gen.llm.decode_graphs import DecodeGraphs
from multimodal_gen.llm.loading import TextModel
from tests.support.tape import PlayedBack
from tests.support.text_models import PAGE, make_model, open_model

pytest.importorskip("triton")
pytestmark = [pytest.mark.unit]


class InTorch:
    """Attention by operations that the tape sees, of numbers that are on the device alone."""

    def plan_decoding(self, page_table: Tensor, lengths: Tensor, longest: int, cache: Sequence[Tensor]) -> Attend:
        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            found = cache[layer][:, page_table.long()].transpose(2, 3).flatten(3, 4)  # [2, B, Hkv, L, D]
            seen = torch.arange(found.shape[3]) < lengths[:, None]
            k, v = found.where(seen[:, None, :, None], 0.0)
            return F.scaled_dot_product_attention(q[:, :, None], k, v, seen[:, None, None], enable_gqa=True)[:, :, 0]

        return attend


Step = Callable[[list[tuple[int, int]]], Tensor]  # (text, tokens before it) of each → logits


def steps(model: TextModel, graphs: DecodeGraphs | None) -> Step:
    """Texts of up to ten pages whose numbers are drawn by place, over a cache of their own."""
    cache = model.new_cache(60, PAGE)
    texts = torch.randint(3, 300, (5, 40), generator=torch.Generator().manual_seed(1)).tolist()
    pages = [list(range(10 * text, 10 * text + 10)) for text in range(5)]
    whole = [Span(ids, 0, own, 0) for ids, own in zip(texts, pages, strict=True)]
    with torch.inference_mode():
        model.decoder(Batch.of(whole, PAGE, model.device), cache)

    def step(chosen: list[tuple[int, int]]) -> Tensor:
        spans = [Span([texts[text][before]], before, pages[text], 1) for text, before in chosen]
        batch = Batch.of(spans, PAGE, model.device)
        with torch.inference_mode():
            made = None if graphs is None else graphs.run(batch, cache)
            return (model.decoder(batch, cache) if made is None else made).clone()

    return step


CALLS = [
    [(0, 5), (1, 9), (2, 30)],
    [(0, 6), (3, 1), (2, 31)],
    [(4, 0), (3, 2), (1, 39)],
    [(4, 7)],
    [(4, 8)],
    [(0, 7), (1, 10), (2, 32), (3, 3)],
    [(2, 20)],
]


def compare(model: TextModel, graphs: DecodeGraphs) -> None:
    plain, recorded = steps(model, None), steps(model, graphs)
    for call in CALLS:
        torch.testing.assert_close(recorded(call), plain(call), rtol=1e-4, atol=1e-4)
    assert graphs.replayed == len(CALLS) - 2  # all but the first of four rows and of one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model("qwen3", tmp_path / "model", seed=3)


def test_replayed_steps_compute_what_they_compute_without_graphs(folder: Path) -> None:
    with native.torch_only():
        model = open_model(folder, device="cpu")
        compare(model, DecodeGraphs(model.decoder, InTorch(), PlayedBack()))


def test_prompts_and_steps_with_adapters_are_not_recorded(folder: Path) -> None:
    with native.torch_only():
        model = open_model(folder, device="cpu")
    graphs, cache = DecodeGraphs(model.decoder, InTorch(), PlayedBack()), model.new_cache(4, PAGE)
    longer = Batch.of([Span([3], 0, [0]), Span([3, 4], 0, [1])], PAGE, model.device)
    silent = Batch.of([Span([3], 0, [0], 0)], PAGE, model.device)
    routed = Batch.of([Span([3], 0, [0])], PAGE, model.device, routing=object())  # type: ignore[arg-type]
    assert [graphs.run(batch, cache) for batch in (longer, silent, routed)] == [None] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("again", [False, True], ids=["first", "after sleep"])
def test_graphs_of_a_gpu_compute_what_it_computes_without_them(folder: Path, again: bool) -> None:
    model: Any = open_model(folder, device="cuda")
    assert model.graphs is not None
    if again:
        compare(model, model.graphs)
        model.sleep()
        model.wake()
        model.graphs.replayed = 0
    compare(model, model.graphs)
