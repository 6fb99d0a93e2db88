"""Z-Image on several ranks against one process: whole runs, in float32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal_gen.kernels.int8_product import unavailable
from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.mesh import Mesh
from tests.dist import models
from tests.dist.comparison import (
    TOLERANCE,
    assert_adapters_did_something,
    assert_no_worse,
    assert_same,
    bytes_of,
    matrices,
    write_adapters,
)
from tests.support.checkpoints import make_z_image
from tests.support.ranks import Ranks

pytestmark = [pytest.mark.dist]

DEGREES = [
    Degrees(tp=2),
    Degrees(tp=4),
    Degrees(ulysses=2),
    Degrees(ulysses=4),
    Degrees(ring=2),
    Degrees(ring=3),  # its slices need padding: the model's own sequences are multiples of 32
    Degrees(ulysses=2, ring=2),
    Degrees(cfg=2),
    Degrees(tp=2, ulysses=2),
    Degrees(tp=2, cfg=2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_z_image(tmp_path_factory.mktemp("z_image"), seed=11)


@pytest.fixture(scope="module")
def arguments(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The model's folder and the adapter files."""
    transformer = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shapes = matrices(transformer, "transformer.", "pad_token")
    shapes |= matrices(folder / "text_encoder" / "model.safetensors", "text_encoder.", "embed_tokens")
    files = write_adapters(tmp_path_factory.mktemp("adapters"), shapes, "transformer.layers.0.feed_forward.w2")
    return {"folder": str(folder), **files}


@pytest.fixture(scope="module")
def alone(arguments: dict[str, str]) -> dict[str, Any]:
    """The same on one rank."""
    return models.whole_runs(Mesh.solo(), **arguments)


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_latents_equal_those_of_one_process(
    ranks: Ranks, degrees: Degrees, arguments: dict[str, str], alone: dict[str, Any]
) -> None:
    assert_same(ranks.run(degrees, "tests.dist.models:whole_runs", **arguments), alone)


def test_what_is_compared_differs_where_it_should(alone: dict[str, Any]) -> None:
    assert_adapters_did_something(alone, len(models.IMAGES))


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_share_and_what_every_rank_has(ranks: Ranks, size: int, folder: Path) -> None:
    model = models.Model.load(Mesh.solo(), str(folder))
    trees = model.pipeline.trees
    shared = {
        "transformer": bytes_of(trees["transformer"], "to_q", "to_k", "to_v", "to_out", "feed_forward"),
        "text_encoder": bytes_of(trees["text_encoder"], "_proj", "embed_tokens"),
    }
    results = ranks.run(Degrees(tp=size), "tests.dist.models:loaded", folder=str(folder))
    for tree, whole in models.held(model).items():
        divides = tree == "transformer" or size == 2  # the encoder has 2 heads for keys
        share = shared[tree] // size if divides else shared[tree]
        assert shared[tree] > whole // 3
        for found in results:
            assert found[tree] == whole - shared[tree] + share


def test_rows_alone_in_their_forwards(ranks: Ranks, folder: Path) -> None:
    expected = models.one_by_one(Mesh.solo(), str(folder))
    for degrees in (Degrees(cfg=2), Degrees(tp=2, ulysses=2)):
        for found in ranks.run(degrees, "tests.dist.models:one_by_one", folder=str(folder)):
            for name, latents in expected.items():
                assert float((found[name] - latents).abs().max()) <= TOLERANCE


def test_tiles_that_ranks_share_make_the_same_picture(ranks: Ranks, folder: Path) -> None:
    expected = models.decoded(Mesh.solo(), str(folder))
    for found in ranks.run(Degrees(ulysses=2, ring=2), "tests.dist.models:decoded", folder=str(folder)):
        assert all(torch.equal(found[name], pixels) for name, pixels in expected.items())


@pytest.mark.parametrize("degrees", [Degrees(tp=4), Degrees(ring=3), Degrees(tp=2, ulysses=2)], ids=str)
def test_half_precision_loses_no_more_on_ranks(
    ranks: Ranks, degrees: Degrees, folder: Path, alone: dict[str, Any]
) -> None:
    one = models.in_bf16(Mesh.solo(), str(folder))
    assert_no_worse(ranks.run(degrees, "tests.dist.models:in_bf16", folder=str(folder))[0], one, alone)


@pytest.mark.skipif(bool(unavailable(torch.device("cpu"))), reason="this processor multiplies no 8-bit numbers")
def test_eight_bits_lose_no_more_on_ranks(ranks: Ranks, folder: Path, alone: dict[str, Any]) -> None:
    one = models.in_int8(Mesh.solo(), str(folder))
    assert_no_worse(ranks.run(Degrees(tp=2), "tests.dist.models:in_int8", folder=str(folder))[0], one, alone)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_never_holds_more_than_its_share_while_it_loads(folder: Path, tmp_path: Path) -> None:
    large = str(make_z_image(tmp_path, heads=8, head_dim=96, layers=3))
    whole = models.held(models.Model.load(Mesh.solo(), large))["transformer"]
    with Ranks(4) as fresh:
        results = fresh.run(Degrees(tp=4), "tests.dist.models:memory_of_loading", folder=large, tiny=str(folder))
    for found in results:
        slack = 30 << 20  # the VAE, tokenizer, allocator
        assert found["held"] < whole // 2
        assert found["held"] // 2 < found["peak"] < found["held"] + slack < whole
