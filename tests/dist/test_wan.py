"""Wan on several ranks against one process: whole runs, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.weights.header import read_header
from tests.dist import models
from tests.support.adapters import peft_tensors, write_adapter
from tests.support.ranks import Ranks
from tests.support.wan_checkpoints import Variant, make_wan
from tests.support.zoo import zoo_tensors

pytestmark = [pytest.mark.dist]

TOLERANCE = 1e-4  # largest difference of a latent after all steps
DEGREES = [
    Degrees(tp=2),
    Degrees(tp=4),
    Degrees(ulysses=2),
    Degrees(ulysses=4),
    Degrees(ring=2),
    Degrees(ring=3),
    Degrees(ulysses=2, ring=2),
    Degrees(cfg=2),
    Degrees(tp=2, ulysses=2),
    Degrees(tp=2, cfg=2),
]
# Every kind of cross-attention and timestep: text alone, image tokens, two experts with a clean frame or without.
VARIANTS: tuple[Variant, ...] = ("t2v", "i2v", "ti2v_5b", "t2v_a14b")
SHARED = ("attn1.to", "attn2.to", "attn2.add", ".norm_", "ffn")


@pytest.fixture(scope="module", params=VARIANTS)
def arguments(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model's folder and adapter files; the boundary of two experts lies inside a run of four steps."""
    two = request.param.endswith("a14b")
    folder = make_wan(
        tmp_path_factory.mktemp("wan"), request.param, seed=11, ffn=192, boundary=0.8 if two else None
    )
    header = read_header(folder / "transformer" / "diffusion_pytorch_model.safetensors", "")
    shapes = {
        f"transformer.{name.removesuffix('.weight')}": info.shape
        for name, info in header.items()
        if len(info.shape) == 2 and name.endswith(".weight")
    }
    norms = [name for name in header if ".norm_" in name]
    generator = torch.Generator().manual_seed(3)
    of_norms = {f"transformer.{n[:-7]}.diff": torch.randn(header[n].shape, generator=generator) * 0.1 for n in norms}
    too_much = torch.zeros(shapes["transformer.blocks.0.ffn.net.2"])
    too_much[0, :2] = 3e38
    files = {
        "zoo": zoo_tensors(shapes, prefix="", seed=1) | of_norms,
        "plain": peft_tensors(shapes, prefix="", seed=2, size=0.2),
        "too_much": {"transformer.blocks.0.ffn.net.2.diff": too_much},
    }
    adapters = tmp_path_factory.mktemp("adapters")
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
    for i in range(len(models.VIDEOS)):
        kinds = [alone[f"{name}-{i}/0"] for name in ("base", "zoo", "both", "beside", "mixed")]
        distances = {(a, b): float((kinds[a] - kinds[b]).abs().max()) for a in range(5) for b in range(a)}
        equal = {pair for pair, distance in distances.items() if distance <= 1e-2}
        assert equal == (set() if i % 2 else {(4, 0)}), distances  # mixed: every second row is the base model's


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_share_and_what_every_rank_has(ranks: Ranks, size: int, arguments: dict[str, str]) -> None:
    model = models.Model.load(Mesh.solo(), arguments["folder"])
    for found in ranks.run(Degrees(tp=size), "tests.dist.models:weights_held", folder=arguments["folder"]):
        for tree, whole in models.held(model).items():
            places = model.pipeline.trees[tree].places
            divided = [key for key in places if any(part in key for part in SHARED) and "blocks" in key]
            whole_too = [key for key in divided if key.endswith((".to_out.0.bias", ".net.2.bias"))]  # added once
            shared = sum(places[key].view().nbytes for key in set(divided) - set(whole_too))
            assert shared > whole // 2
            assert found[f"held/{tree}"] == whole - shared + shared // size


def test_tiles_that_ranks_share_make_the_same_frames(ranks: Ranks, arguments: dict[str, str]) -> None:
    expected = models.decoded(Mesh.solo(), arguments["folder"])
    degrees = Degrees(ulysses=2, ring=2)
    for found in ranks.run(degrees, "tests.dist.models:decoded", folder=arguments["folder"]):
        assert all(torch.equal(found[name], pixels) for name, pixels in expected.items())
