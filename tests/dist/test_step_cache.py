"""Step caches on several ranks: all decide alike, and as one process does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.mesh import Mesh
from tests.dist import models
from tests.dist.comparison import assert_same
from tests.support.checkpoints import make_z_image
from tests.support.ranks import Ranks
from tests.support.wan_checkpoints import make_wan

pytestmark = [pytest.mark.dist]

# Tiny random models change by more than their size from step to step; two rows without guidance change hands.
CACHES = [
    "first-block:threshold=1.345,warmup=3",
    "first-block:threshold=1.27,warmup=2,order=0",
    "taylor:warmup=3",
    "none",
    "taylor:interval=3,order=2,warmup=1",
]
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "zimage": lambda folder: make_z_image(folder, seed=11, layers=3),
    "t2v_a14b": lambda folder: make_wan(folder, "t2v_a14b", layers=3),
}
DEGREES = [Degrees(tp=2), Degrees(ulysses=2, ring=2), Degrees(ring=3), Degrees(cfg=2), Degrees(ulysses=2, cfg=2)]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """What to run, and what one process makes of it."""
    folder = str(FAMILIES[request.param](tmp_path_factory.mktemp("model")))
    arguments = {"folder": folder, "caches": CACHES}
    return arguments, models.with_caches(Mesh.solo(), **arguments)


def test_what_is_compared_skips_steps(case: tuple[dict[str, Any], Any]) -> None:
    counts = [int(case[1][f"skipped-{index}"]) for index in range(len(CACHES))]
    assert counts[3] == 0
    assert all(0 < counts[index] < 6 for index in (0, 1, 2, 4)), counts


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_all_ranks_skip_the_steps_that_one_process_skips(
    ranks: Ranks, case: tuple[dict[str, Any], Any], degrees: Degrees
) -> None:
    arguments, alone = case
    assert_same(ranks.run(degrees, "tests.dist.models:with_caches", **arguments), alone)


@pytest.mark.parametrize("degrees", [Degrees(cfg=2), Degrees(tp=2, cfg=2)], ids=str)
def test_a_disk_that_fails_for_one_rank_costs_the_request_and_no_more(
    ranks: Ranks, tmp_path: Path, degrees: Degrees
) -> None:
    """Both halves of a forward end with a vote: nobody waits for what a rank looked at that could not read."""
    ranks.run(
        degrees,
        "tests.dist.models:one_rank_cannot_read",
        folder=str(make_z_image(tmp_path, seed=11, layers=5)),
        guidance_scale=4.0,
        cache="first-block:threshold=1.345,warmup=3",
        offload="layerwise",
    )
