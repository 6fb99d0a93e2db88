"""The models that the settings name: found, checked and described before anything is loaded. No torch here."""

from __future__ import annotations

import msgspec

from multimodal_gen.config import NO_MODEL, EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.request import ModelCard
from multimodal_gen.text import TextCard


class Cards(msgspec.Struct, frozen=True):
    """What one engine hosts; at least one of the two."""

    pictures: ModelCard | None
    text: TextCard | None

    @property
    def name(self) -> str:
        """Of all of it, for people."""
        return " and ".join(card.name for card in (self.pictures, self.text) if card is not None)


def describe(config: EngineConfig) -> Cards:
    """Raises: ModelNotFound, CorruptModel, RemoteCodeRefused, ConfigError."""
    pictures, text = None, None
    if config.model_path != NO_MODEL:
        from multimodal_gen.pipelines import registry

        pictures = registry.describe(config)
    elif config.lora:
        raise ConfigError(
            "--lora names adapters of a model of pictures, and none is loaded; --lora-paths names those of the "
            "language model.",
            param="lora",
        )
    elif config.compile or config.cuda_graphs:
        param = "compile" if config.compile else "cuda_graphs"
        raise ConfigError(
            f"--{param.replace('_', '-')} is for layers of pictures and videos, and no such model is loaded.",
            param=param,
        )
    if config.llm_path is not None:
        from multimodal_gen.llm.card import describe as describe_text

        text = describe_text(config)
    elif config.lora_paths:
        raise ConfigError(
            "--lora-paths names adapters of a language model, and none is loaded (--llm-path); --lora names those of a "
            "model of pictures.",
            param="lora_paths",
        )
    if pictures is None and text is None:
        raise ConfigError(
            "There is nothing to load: --model-path is none, and --llm-path is not given.", param="model_path"
        )
    return Cards(pictures, text)
