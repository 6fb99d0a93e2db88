"""Wan on several ranks against one process: whole runs of all layouts, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.mesh import Mesh
from tests.dist import models
from tests.dist.comparison import (
    assert_adapters_did_something,
    assert_no_worse,
    assert_same,
    bytes_of,
    matrices,
    vectors,
    write_adapters,
)
from tests.dist.models import encoder_of
from tests.support.ranks import Ranks
from tests.support.wan_checkpoints import VARIANTS, make_wan

pytestmark = [pytest.mark.dist]

ALL = [
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
# Two experts are two of the others: what is theirs alone is the boundary, which all kinds of sharing cross alike.
SOME = {
    "t2v_a14b": [Degrees(tp=4), Degrees(ring=2, cfg=2)],
    "i2v_a14b": [Degrees(ulysses=2, ring=2), Degrees(tp=2, ulysses=2)],
}
CASES = [(v, degrees) for v in VARIANTS for degrees in SOME.get(v, ALL)]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, str], dict[str, Any]]]:
    """`case("i2v")`: the folder and adapter files of a variant, and the results of one process."""
    made: dict[str, tuple[dict[str, str], dict[str, Any]]] = {}

    def get(variant: str) -> tuple[dict[str, str], dict[str, Any]]:
        if variant not in made:
            two = variant.endswith("a14b")  # experts, whose boundary has to lie inside a run of four steps
            folder = make_wan(tmp_path_factory.mktemp("wan"), variant, seed=7, boundary=0.8 if two else None)
            transformer = folder / "transformer" / "diffusion_pytorch_model.safetensors"
            shapes, norms = matrices(transformer, "transformer."), vectors(transformer, "transformer.", ".norm_")
            assert norms, "norms across heads are shared out too"
            adapters = tmp_path_factory.mktemp("adapters")
            files = write_adapters(adapters, shapes, "transformer.blocks.0.ffn.net.2", norms)
            arguments = {"folder": str(folder), **files}
            made[variant] = arguments, models.whole_runs(Mesh.solo(), **arguments)
        return made[variant]

    return get


@pytest.mark.parametrize(("variant", "degrees"), CASES, ids=str)
def test_latents_equal_those_of_one_process(
    ranks: Ranks, case: Callable[[str], tuple[dict[str, str], dict[str, Any]]], variant: str, degrees: Degrees
) -> None:
    arguments, alone = case(variant)
    assert_same(ranks.run(degrees, "tests.dist.models:whole_runs", **arguments), alone)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_compared_differs_where_it_should(
    case: Callable[[str], tuple[dict[str, str], dict[str, Any]]], variant: str
) -> None:
    assert_adapters_did_something(case(variant)[1], len(models.VIDEOS))


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_share_and_what_every_rank_has(ranks: Ranks, tmp_path: Path, variant: str, size: int) -> None:
    folder = str(make_wan(tmp_path, variant))
    model = models.Model.load(Mesh.solo(), folder)
    text, transformer = encoder_of(model).weights, model.pipeline.trees["transformer"]
    shared = bytes_of(transformer, ".attn1.", ".attn2.", ".ffn.")
    # What is added to all-reduced sums is every rank's own.
    shared -= bytes_of(transformer, ".to_out.0.bias", ".ffn.net.2.bias")
    whole = models.held(model)["transformer"]
    assert shared > whole // 2
    norms = bytes_of(text, "layer_norm")
    for found in ranks.run(Degrees(tp=size), "tests.dist.models:loaded", folder=folder):
        assert found["transformer"] == whole - shared + shared // size
        assert found["text_encoder"] == norms + (bytes_of(text, "") - norms) // size


@pytest.mark.parametrize("variant", ["t2v", "ti2v_5b"])
def test_tiles_that_ranks_share_make_the_same_frames(
    ranks: Ranks, case: Callable[[str], tuple[dict[str, str], dict[str, Any]]], variant: str
) -> None:
    folder = case(variant)[0]["folder"]
    expected = models.decoded(Mesh.solo(), folder)
    for found in ranks.run(Degrees(ulysses=2, ring=2), "tests.dist.models:decoded", folder=folder):
        assert all(torch.equal(found[name], pixels) for name, pixels in expected.items())


@pytest.mark.parametrize("degrees", [Degrees(tp=4), Degrees(ring=3)], ids=str)
def test_half_precision_loses_no_more_on_ranks(
    ranks: Ranks, case: Callable[[str], tuple[dict[str, str], dict[str, Any]]], degrees: Degrees
) -> None:
    arguments, alone = case("t2v")
    folder = arguments["folder"]
    one = models.in_bf16(Mesh.solo(), folder)
    assert_no_worse(ranks.run(degrees, "tests.dist.models:in_bf16", folder=folder)[0], one, alone)
