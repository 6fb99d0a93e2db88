"""The plan that `mmgen doctor` shows, also of models of real size, which take no room on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from multimodal_gen.cli.doctor import examine
from multimodal_gen.config import EngineConfig
from multimodal_gen.settings import load
from tests.support.sparse import make_wan_a14b
from tests.support.wan_checkpoints import make_wan

pytestmark = [pytest.mark.unit]

GB = 10**9


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan2.2-T2V-A14B: 68.8 GB of weights."""
    return make_wan_a14b(make_wan(tmp_path_factory.mktemp("big") / "a14b", "t2v_a14b"))


def report(gpu: str | None = None, **settings: Any) -> dict[str, Any]:
    return examine(load(EngineConfig, settings, environ={}), gpu)


def planned(gpu: str | None = None, **settings: Any) -> dict[str, Any]:
    found = report(gpu, **settings)
    assert found["problems"] == []
    assert found["model"]["fits"] is True
    made: dict[str, Any] = found["plan"]
    return made


def kept(made: dict[str, Any]) -> dict[str, tuple[str, int]]:
    return {part["name"]: (part["residency"], len(part["resident_layers"])) for part in made["components"]}


def test_a_model_is_planned_for_a_gpu_that_is_elsewhere_without_loading_it(big: Path) -> None:
    made = planned("RTX 4090", model_path=big, offload="layerwise", resident_layers=4)
    assert (made["place"], made["dtype"], made["free_bytes"]) == ("rtx-4090", "bfloat16", 24 * GB)
    assert made["peak_bytes"] <= made["limit_bytes"] < 24 * GB
    assert kept(made) == {
        "transformer": ("streamed", 4),
        "transformer_2": ("streamed", 4),
        "text_encoder": ("streamed", 0),
        "vae": ("resident", 0),
    }
    assert 0.69 * GB < made["slot_bytes"] < 0.71 * GB
    assert made["moved_bytes_per_step"] == 36 * made["slot_bytes"]
    assert made["slowdown"] >= 0
    assert "transformer_2  streamed, 4 of 40 layers resident, 702.7 MB per layer" in made["lines"]


def test_a_gpu_with_room_for_all_streams_nothing_and_a_smaller_one_does(big: Path) -> None:
    assert planned("h200", model_path=big)["slots"] == 0
    small = planned("24GB", model_path=big)
    assert small["slots"] == 2
    assert small["slowdown"] is None  # a size says nothing of the speed
    assert small["peak_bytes"] <= small["limit_bytes"]


def test_ranks_plan_their_shares(big: Path) -> None:
    weights = [
        sum(part["bytes"] for part in planned("h200", model_path=big, tp_size=ranks)["components"]) for ranks in (1, 2)
    ]
    assert weights[1] == pytest.approx(weights[0] / 2, rel=0.1)


def test_what_cannot_fit_is_a_problem_that_names_the_flag(big: Path) -> None:
    found = report("24GB", model_path=big, offload="none")
    assert found["model"]["fits"] is False
    (problem,) = found["problems"]
    assert "with --offload none it needs 69.1 GB for its weights alone, and 22.8 GB are available." in problem
    assert "--offload auto would fit, with" in problem


def test_a_limit_is_planned_for_on_this_machine() -> None:
    made = planned(offload="layerwise", device_memory_limit="225MB")
    assert made["limit_bytes"] == 225_000_000
    assert made["slots"] == 2
    assert made["slowdown"] >= 0
    assert made["lines"][-1].startswith("peak ")


def test_a_limit_below_what_the_default_size_needs_is_noted_and_smaller_requests_are_planned(big: Path) -> None:
    usual = planned("h100", model_path=big, offload="layerwise")
    assert usual["warning"] is None
    tight = planned("h100", model_path=big, offload="layerwise", device_memory_limit=usual["peak_bytes"] - 1)
    assert tight["peak_bytes"] < usual["peak_bytes"]
    assert tight["warning"].startswith("A request of the model's default size needs ")


@pytest.mark.parametrize(
    ("gpu", "settings", "expected"),
    [
        (None, {"offload_components": ["txt_encoder=parked"]}, "Did you mean 'text_encoder'?"),
        (None, {"offload_components": ["vae=streamed"]}, "vae has no list of layers. Say vae=parked."),
        (None, {"pin_memory": "1GB", "device": "cpu"}, "no effect on a CPU"),
        ("24GB", {"device": "cpu"}, "--gpu plans for a GPU, and --device cpu for none"),
    ],
)
def test_settings_that_this_model_cannot_honour_are_problems(
    gpu: str | None, settings: dict[str, Any], expected: str
) -> None:
    (problem,) = report(gpu, **settings)["problems"]
    assert expected in problem
