"""Z-Image on several ranks against one process: whole runs, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.weights.header import read_header
from multimodal_gen.weights.loading import Place
from tests.dist import models
from tests.support.adapters import peft_tensors, write_adapter
from tests.support.checkpoints import make_z_image
from tests.support.ranks import Ranks
from tests.support.zoo import zoo_tensors

pytestmark = [pytest.mark.dist]

TOLERANCE = 1e-4  # largest difference of a latent after all steps
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
    adapters = tmp_path_factory.mktemp("adapters")
    shapes = {
        (tree, name.removesuffix(".weight")): info.shape
        for tree, file in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model"))
        for name, info in read_header(folder / tree / f"{file}.safetensors", "").items()
        if len(info.shape) == 2 and "pad" not in name and "embed_tokens" not in name
    }
    inner = {f"{tree}.{name}": shape for (tree, name), shape in shapes.items()}
    zoo, plain = zoo_tensors(inner, prefix="", seed=1), peft_tensors(inner, prefix="", seed=2, size=0.2)
    wide = inner["transformer.layers.0.feed_forward.w2"]
    too_much = {"transformer.layers.0.feed_forward.w2.diff": torch.zeros(wide)}
    too_much["transformer.layers.0.feed_forward.w2.diff"][0, 0] = 3e38
    too_much["transformer.layers.0.feed_forward.w2.diff"][0, 1] = 3e38
    files = {"zoo": zoo, "plain": plain, "too_much": too_much}
    written = {name: str(write_adapter(adapters / f"{name}.safetensors", tensors)) for name, tensors in files.items()}
    return {"folder": str(folder), **written}


@pytest.fixture(scope="module")
def alone(arguments: dict[str, str]) -> dict[str, Any]:
    """The same on one rank."""
    return models.whole_runs(Mesh.solo(), **arguments)


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_latents_equal_those_of_one_process(
    ranks: Ranks, degrees: Degrees, arguments: dict[str, str], alone: dict[str, Any]
) -> None:
    results = ranks.run(degrees, "tests.dist.models:whole_runs", **arguments)
    for name, expected in alone.items():
        if name.startswith("held/"):
            continue
        difference = float((results[0][name] - expected).abs().max())
        assert difference <= TOLERANCE, f"{name}: {difference:.2e}"
        for found in results[1:]:
            assert torch.equal(found[name], results[0][name]), f"{name}: ranks differ"


def test_what_is_compared_differs_where_it_should(alone: dict[str, Any]) -> None:
    """Adapters that did nothing would pass the comparison above."""
    for i in range(len(models.BATCH)):
        kinds = [alone[f"{name}-{i}/0"] for name in ("base", "zoo", "both", "beside", "mixed")]
        assert len(kinds[0]) == 16
        distances = {(a, b): float((kinds[a] - kinds[b]).abs().max()) for a in range(5) for b in range(a)}
        equal = {pair for pair, distance in distances.items() if distance <= 1e-2}
        assert equal == (set() if i % 2 else {(4, 0)}), distances  # mixed: every second row is the base model's


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_share_and_what_every_rank_has(
    ranks: Ranks, size: int, arguments: dict[str, str], alone: dict[str, Any]
) -> None:
    model = models.Model.load(Mesh.solo(), arguments["folder"])
    trees = model.pipeline.trees
    shared = {
        "transformer": _bytes(trees["transformer"].places, ("to_q", "to_k", "to_v", "to_out", "feed_forward")),
        "text_encoder": _bytes(trees["text_encoder"].places, ("_proj",)),
    }
    results = ranks.run(Degrees(tp=size), "tests.dist.models:whole_runs", **arguments)
    for tree, whole in models.held(model).items():
        divides = tree == "transformer" or size == 2  # the encoder has 2 heads for keys
        share = shared[tree] // size if divides else shared[tree]
        assert shared[tree] > whole // 3
        for found in results:
            assert found[f"held/{tree}"] == whole - shared[tree] + share


def _bytes(places: dict[str, Place], parts: tuple[str, ...]) -> int:
    return sum(place.view().nbytes for key, place in places.items() if any(part in key for part in parts))


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
