"""Settings and a card become degrees, or an error before anything is loaded that names both numbers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.plan import Plan, plan
from multimodal_gen.pipelines import registry
from multimodal_gen.request import ModelCard
from multimodal_gen.text import TextCard

pytestmark = [pytest.mark.unit]


@pytest.fixture(scope="module")
def card() -> ModelCard:
    """The bundled model's, but with 12 heads."""
    return msgspec.structs.replace(registry.describe(EngineConfig()), heads=12)


@pytest.mark.parametrize(
    ("given", "dp", "degrees"),
    [
        ({}, 1, Degrees()),
        ({"num_gpus": 1}, 1, Degrees()),
        ({"num_gpus": 4}, 1, Degrees(ulysses=4)),
        ({"num_gpus": 8}, 1, Degrees(ulysses=4, ring=2)),  # 8 does not divide 12
        ({"num_gpus": 5}, 1, Degrees(ring=5)),
        ({"num_gpus": 8, "tp_size": 2}, 1, Degrees(tp=2, ulysses=2, ring=2)),  # 2 x 4 does not divide 12 either
        ({"num_gpus": 8, "enable_cfg_parallel": True}, 1, Degrees(cfg=2, ulysses=4)),
        ({"num_gpus": 8, "dp_size": 4}, 4, Degrees(ulysses=2)),
        ({"num_gpus": 6, "ring_degree": 3}, 1, Degrees(ulysses=2, ring=3)),
        ({"num_gpus": 6, "ulysses_degree": 3}, 1, Degrees(ulysses=3, ring=2)),
        ({"num_gpus": 2, "ulysses_degree": 1}, 1, Degrees(ring=2)),
        ({"tp_size": 3, "ulysses_degree": 2, "dp_size": 2}, 2, Degrees(tp=3, ulysses=2)),
        ({"enable_cfg_parallel": True}, 1, Degrees(cfg=2)),
        ({"ring_degree": 2, "attention_backend": "sdpa"}, 1, Degrees(ring=2)),
        ({"num_gpus": 12, "device": "cuda"}, 1, Degrees(ulysses=12)),
    ],
)
def test_what_is_left_open_is_filled(card: ModelCard, given: dict[str, Any], dp: int, degrees: Degrees) -> None:
    made = plan(EngineConfig(**given), card)
    assert made == Plan(dp, degrees)
    assert made.workers == dp * degrees.world
    assert given.get("num_gpus", made.workers) == made.workers


@pytest.mark.parametrize(
    ("given", "message", "param"),
    [
        ({"num_gpus": 3, "tp_size": 2}, "--num-gpus 3 .* tp 2 .* needs a multiple of 2", "num_gpus"),
        ({"num_gpus": 1, "dp_size": 2}, "--num-gpus 1 .* dp 2 .* needs a multiple of 2", "num_gpus"),
        (
            {"num_gpus": 8, "ulysses_degree": 2, "ring_degree": 2},
            "--num-gpus 8 .* ulysses 2 x ring 2 needs 4",
            "num_gpus",
        ),
        ({"tp_size": 5}, "12 attention heads .* tp 5 x ulysses 1 = 5 ranks; the product must divide 12", "tp_size"),
        ({"tp_size": 4, "ulysses_degree": 2}, "12 attention heads .* tp 4 x ulysses 2 = 8", "ulysses_degree"),
        ({"num_gpus": 10, "ring_degree": 2}, "12 attention heads .* ulysses 5 = 5", "ulysses_degree"),
        (
            {"ring_degree": 2, "attention_backend": "onednn"},
            "--ring-degree 2 needs .* log-sum-exp, and onednn is none; use auto, native, triton, sdpa or naive",
            "attention_backend",
        ),
        ({"num_gpus": 5, "attention_backend": "onednn"}, "--ring-degree 5 needs", "attention_backend"),
        ({"num_gpus": 2, "device": "cuda:1"}, "--device cuda:1 names 1 device, and 2 ranks", "device"),
    ],
)
def test_what_cannot_be_is_refused_with_both_numbers(
    card: ModelCard, given: dict[str, Any], message: str, param: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan(EngineConfig(**given), card)
    assert caught.value.param == param


def test_guidance_on_two_groups_needs_guidance(card: ModelCard) -> None:
    config = EngineConfig(enable_cfg_parallel=True)
    for unguided in (
        msgspec.structs.replace(card, parameters=card.parameters - {"guidance_scale"}),
        msgspec.structs.replace(card, guidance_threshold=float("inf")),
    ):
        with pytest.raises(ConfigError, match=r"wants 2 groups of ranks, and .* has 1 branch"):
            plan(config, unguided)


def test_a_family_that_cannot_be_shared_out_still_has_replicas(card: ModelCard) -> None:
    whole = msgspec.structs.replace(card, heads=0)
    assert plan(EngineConfig(dp_size=3), whole) == Plan(3, Degrees())
    with pytest.raises(ConfigError, match=r"runs on 1 rank per replica, and 2 were asked for \(tp 2\).*--dp-size"):
        plan(EngineConfig(tp_size=2), whole)
    with pytest.raises(ConfigError, match="1 rank per replica, and 4 were asked for"):
        plan(EngineConfig(num_gpus=4), whole)


@pytest.mark.parametrize(
    ("device", "devices", "fits"),
    [
        ("cuda", 3, False),
        ("cuda", 4, True),
        ("cuda", 0, False),
        ("auto", 3, False),
        ("auto", 0, True),
        ("cpu", 0, True),
    ],
)
def test_every_rank_needs_a_device(card: ModelCard, device: str, devices: int, fits: bool) -> None:
    config = EngineConfig(dp_size=2, tp_size=2, device=device)
    if fits:
        assert plan(config, card, devices).workers == 4
    else:
        with pytest.raises(ConfigError, match=f"4 ranks need a CUDA device each, and {devices} are visible"):
            plan(config, card, devices)


TEXT = TextCard(
    name="tiny", family="llama", path="", format="gguf", context=64, vocab_size=9, layers=1, heads=6, kv_heads=2,
    head_dim=8, parameters=1, weight_bytes=1, eos_ids=(2,),
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, Plan(1, Degrees())),
        ({"tp_size": 2}, Plan(1, Degrees(tp=2))),
        ({"num_gpus": 3}, Plan(1, Degrees(tp=3))),
        ({"num_gpus": 4, "dp_size": 2}, Plan(2, Degrees(tp=2))),
        ({"num_gpus": 4, "dp_size": 2, "tp_size": 2}, Plan(2, Degrees(tp=2))),
        ({"dp_size": 5}, Plan(5, Degrees())),
        ({"ulysses_degree": 1, "ring_degree": 1}, Plan(1, Degrees())),
    ],
)
def test_ranks_of_a_language_model_alone_share_every_layer(given: dict[str, Any], made: Plan) -> None:
    assert plan(EngineConfig(model_path="none", **given), None, text=TEXT) == made


@pytest.mark.parametrize(
    ("given", "message", "param"),
    [
        ({"tp_size": 4}, "6 attention heads of tiny .* 4 ranks", "tp_size"),
        ({"num_gpus": 5}, "6 attention heads of tiny .* 5 ranks", "tp_size"),
        ({"num_gpus": 3, "tp_size": 2}, "--num-gpus 3 .* dp 1 x tp 2", "num_gpus"),
        ({"num_gpus": 3, "dp_size": 2}, "--num-gpus 3 .* dp 2 x tp 1", "num_gpus"),
        ({"ring_degree": 2}, "--ring-degree 2 shares out pictures", "ring_degree"),
        ({"ulysses_degree": 3}, "--ulysses-degree 3 shares out pictures", "ulysses_degree"),
        ({"enable_cfg_parallel": True}, "--enable-cfg-parallel", "enable_cfg_parallel"),
    ],
)
def test_what_a_language_model_alone_cannot_be_shared_out_by_is_refused(
    given: dict[str, Any], message: str, param: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan(EngineConfig(model_path="none", **given), None, text=TEXT)
    assert caught.value.param == param


def test_beside_pictures_the_ranks_are_those_of_the_pictures(card: ModelCard) -> None:
    config = EngineConfig(num_gpus=4, llm_path="tiny")
    assert plan(config, card, text=TEXT) == plan(config, card)
