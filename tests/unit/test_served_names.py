"""Under which names a server's models go, and what it says when it is ready."""

from __future__ import annotations

from typing import Any

import pytest

from multimodal_gen.config import NO_MODEL, EngineConfig, ServerConfig
from multimodal_gen.engine.cards import Cards, describe
from multimodal_gen.errors import ConfigError
from multimodal_gen.pipelines import registry
from multimodal_gen.server.context import main_name
from multimodal_gen.server.run import _example
from tests.support.llm import smollm2_card

pytestmark = [pytest.mark.unit]

PICTURES, TEXT = registry.describe(EngineConfig()), smollm2_card()


@pytest.mark.parametrize(
    ("cards", "served", "name"),
    [
        (Cards(PICTURES, None), None, "emoji-image"),
        (Cards(PICTURES, TEXT), None, "emoji-image"),
        (Cards(None, TEXT), None, "smollm2"),
        (Cards(PICTURES, TEXT), "art", "art"),
        (Cards(None, TEXT), "gpt", "gpt"),
    ],
)
def test_the_given_name_is_that_of_the_model_of_pictures_or_else_of_text(
    cards: Cards, served: str | None, name: str
) -> None:
    assert main_name(cards, ServerConfig(served_model_name=served)) == name


def test_the_example_is_one_that_the_server_can_answer() -> None:
    assert _example(Cards(None, TEXT), "").startswith("/v1/chat/completions ")
    assert _example(Cards(PICTURES, TEXT), "").startswith("/v1/images/generations ")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"model_path": NO_MODEL}, "model_path"),
        ({"model_path": NO_MODEL, "llm_path": "smollm2", "lora": ["a=b.safetensors"]}, "lora"),
        ({"lora_paths": ["a=b.safetensors"]}, "lora_paths"),
    ],
)
def test_settings_of_a_model_that_is_not_there_are_refused(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        describe(EngineConfig(**given))
    assert caught.value.param == param


def test_both_models_are_described_before_anything_is_loaded() -> None:
    cards = describe(EngineConfig(llm_path="smollm2"))
    assert cards.name == "emoji-image and smollm2"
    assert cards.text is not None
    assert (cards.text.family, cards.text.heads) == (TEXT.family, TEXT.heads)
    alone = describe(EngineConfig(model_path=NO_MODEL, llm_path="smollm2"))
    assert (alone.pictures, alone.name) == (None, "smollm2")
