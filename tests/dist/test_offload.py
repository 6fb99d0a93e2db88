"""Weights that come and go give the bits of weights that stay: every family, every way of keeping, adapters, ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.mesh import Mesh
from tests.dist import models
from tests.dist.comparison import matrices, write_adapters
from tests.support.checkpoints import make_z_image
from tests.support.ranks import Ranks
from tests.support.wan_checkpoints import make_wan

pytestmark = [pytest.mark.dist]

WAYS: dict[str, dict[str, Any]] = {
    "streamed": {"offload": "layerwise"},
    "without prefetch, around the page cache": {
        "offload": "layerwise",
        "prefetch_layers": "0",
        "host_memory_limit": 0,
    },
    "three layers ahead": {"offload": "layerwise", "prefetch_layers": "3"},
    "two layers stay": {"offload": "layerwise", "resident_layers": 2},
    "parked": {"offload": "component"},
    "each its own way": {"offload": "none", "offload_components": ["transformer=streamed", "text_encoder=parked"]},
}
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "zimage": lambda folder: make_z_image(folder, seed=11, layers=5),
    "t2v": lambda folder: make_wan(folder, "t2v", layers=5),
    "i2v": lambda folder: make_wan(folder, "i2v", layers=4),
    "a14b": lambda folder: make_wan(folder, "t2v_a14b", layers=4),
    "5b": lambda folder: make_wan(folder, "ti2v_5b", layers=4),
}


@dataclass
class Family:
    """A model, its adapters, and what it makes with everything in memory."""

    arguments: dict[str, str]
    resident: dict[str, Tensor]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = FAMILIES[request.param](tmp_path_factory.mktemp("model"))
    shapes = matrices(folder / "transformer" / "diffusion_pytorch_model.safetensors", "transformer.", "pad_token")
    if request.param == "zimage":
        shapes |= matrices(folder / "text_encoder" / "model.safetensors", "text_encoder.")
    linear = {name: shape for name, shape in shapes.items() if "embed_tokens" not in name}  # others can only be merged
    zoo, plain = (
        write_adapters(tmp_path_factory.mktemp("adapters"), found, next(iter(found)))[kind]
        for kind, found in (("zoo", shapes), ("plain", linear))
    )
    arguments = {"folder": str(folder), "zoo": zoo, "plain": plain}
    return Family(arguments, models.under_offload(Mesh.solo(), **arguments, offload="none"))


@pytest.mark.parametrize("way", WAYS)
def test_bits_are_the_same_wherever_weights_are(family: Family, way: str) -> None:
    found = models.under_offload(Mesh.solo(), **family.arguments, **WAYS[way])
    assert_equal(found, family.resident)


@pytest.mark.parametrize("way", ["without prefetch, around the page cache", "parked"])
def test_each_rank_streams_its_share(ranks: Ranks, family: Family, way: str) -> None:
    function = "tests.dist.models:under_offload"
    expected = ranks.run(Degrees(tp=2), function, **family.arguments, offload="none")
    streamed = ranks.run(Degrees(tp=2), function, **family.arguments, **WAYS[way])
    for found, resident in zip(streamed, expected, strict=True):
        assert_equal(found, resident)


@pytest.mark.parametrize("family", ["zimage", "a14b"], indirect=True)
def test_ranks_that_share_a_sequence_stream_all_of_it(ranks: Ranks, family: Family) -> None:
    function, degrees = "tests.dist.models:under_offload", Degrees(tp=2, ulysses=2)
    expected = ranks.run(degrees, function, **family.arguments, offload="none")
    streamed = ranks.run(degrees, function, **family.arguments, **WAYS["streamed"])
    for found, resident in zip(streamed, expected, strict=True):
        assert_equal(found, resident)


@pytest.mark.parametrize("guidance", [4.0, 0.0])
@pytest.mark.parametrize("offload", ["layerwise", "component"])
@pytest.mark.parametrize("degrees", [Degrees(tp=2), Degrees(cfg=2), Degrees(tp=2, ulysses=2)], ids=str)
def test_a_disk_that_fails_for_one_rank_costs_the_request_and_no_more(
    ranks: Ranks, tmp_path_factory: pytest.TempPathFactory, degrees: Degrees, offload: str, guidance: float
) -> None:
    folder = str(make_z_image(tmp_path_factory.mktemp("model"), seed=11, layers=5))
    ranks.run(
        degrees,
        "tests.dist.models:one_rank_cannot_read",
        folder=folder,
        guidance_scale=guidance,
        offload=offload,
    )


def test_what_is_compared_differs_where_it_should(family: Family) -> None:
    kinds = [family.resident[f"{kind}-1/0"] for kind in ("base", "zoo", "both", "beside", "mixed")]
    assert all(not torch.equal(a, b) for i, a in enumerate(kinds) for b in kinds[:i] if a is not kinds[4])


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    different = [name for name, value in expected.items() if name != "held" and not torch.equal(found[name], value)]
    assert different == []
    assert found["held"] < expected["held"], "all is in memory"
