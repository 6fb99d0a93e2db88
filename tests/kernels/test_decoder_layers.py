"""All layers in one call against the layers one by one: every family's biases and norms, both dtypes, int8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multimodal_gen.kernels import native
from multimodal_gen.llm.batch import Batch, Span
from multimodal_gen.llm.kv_cache import KVCache
from multimodal_gen.llm.loading import TextModel
from multimodal_gen.llm.models.whole import bind
from multimodal_gen.nn.lowrank import Routing
from tests.support.text_models import FAMILIES, make_model, open_model

pytestmark = [pytest.mark.kernels]
PAGE, PAGES = 8, 60
CASES = [
    # Family, dtype, quantisation, tolerance of logits: each rounds at other places than the other does, and int8 rounds
    # rows that differ in their last bit to neighbouring numbers.
    ("llama", "float32", "none", 1e-5),
    ("qwen2", "float32", "none", 1e-5),
    ("qwen3", "float32", "none", 1e-5),
    ("qwen2", "bfloat16", "none", 5e-2),
    ("qwen3", "bfloat16", "none", 5e-2),
    ("qwen3", "float32", "int8", 3e-2),
    ("qwen3", "bfloat16", "int8", 1.5e-1),
]
# Tokens before and new ones of each sequence, forward by forward: prompts, chunks of them beside decoding, decoding.
FORWARDS = [[(0, 13), (0, 1), (0, 30)], [(13, 1), (1, 20), (30, 1)], [(14, 1), (21, 1), (31, 1)]]


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if native.unavailable():
        pytest.skip(native.unavailable())


def logits(model: TextModel, cache: KVCache, spans: list[Span], *, whole: bool) -> torch.Tensor:
    # A routing, even an empty one, stands between the layers.
    batch = Batch.of(spans, PAGE, model.device, None if whole else Routing(()))
    return model.forward(batch, cache)


def spans_of(forward: list[tuple[int, int]]) -> list[Span]:
    ids = torch.randint(320, (64,), generator=torch.Generator().manual_seed(sum(map(sum, forward)))).tolist()
    pages = [list(range(10 * at, 10 * at + 10)) for at in range(len(forward))]
    return [Span(ids[at : at + count], start, pages[at], 1, at) for at, (start, count) in enumerate(forward)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, heads = tmp_path_factory.mktemp("models"), {"num_attention_heads": 3, "num_key_value_heads": 1}
    own: dict[str, dict[str, bool]] = {"llama": {"attention_bias": True}}
    return {family: make_model(family, root / family, **heads, **own.get(family, {})) for family in FAMILIES}


@pytest.mark.parametrize(("family", "dtype", "quantization", "tolerance"), CASES)
def test_one_call_computes_what_the_layers_do(
    family: str, dtype: str, quantization: str, tolerance: float, folders: dict[str, Path]
) -> None:
    model = open_model(folders[family], dtype, llm_quantize=quantization)
    caches = [model.new_cache(PAGES, PAGE) for _ in range(2)]
    if bind(model.decoder.layers, caches[0]) is None:
        pytest.skip(f"this processor has no instructions for {dtype} or {quantization}")
    for forward in FORWARDS:
        spans = spans_of(forward)
        found = logits(model, caches[0], spans, whole=True)
        wanted = logits(model, caches[1], spans, whole=False)
        assert (found - wanted).norm() < tolerance * wanted.norm(), forward
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert (one.float() - other.float()).norm() < tolerance * other.float().norm()


def test_layers_are_bound_anew_to_another_cache_and_after_sleep(folders: dict[str, Path]) -> None:
    model = open_model(folders["qwen3"])
    spans, said = spans_of([(0, 9)]), []
    for _ in range(2):
        said += [logits(model, model.new_cache(PAGES, PAGE), spans, whole=True) for _ in range(2)]
        model.sleep()
        model.wake()
    assert all(torch.equal(one, said[0]) for one in said)


def test_layers_in_another_form_are_not_bound(folders: dict[str, Path]) -> None:
    model = open_model(folders["qwen3"], llm_quantize="int4-weights")
    assert bind(model.decoder.layers, model.new_cache(PAGES, PAGE)) is None
