"""The models that the settings name: found, checked and described before anything is loaded. No torch here."""

from __future__ import annotations

import msgspec

from multimodal_gen.config import NO_MODEL, EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.request import ModelCard
from multimodal_gen.step_cache import NONE
from multimodal_gen.text import TextCard

# Settings of models of pictures and videos alone; their value where nobody set them; what to do without such a model.
_OF_PICTURES: tuple[tuple[str, object, str], ...] = (
    ("lora", [], "--lora-paths names adapters of the language model"),
    ("quantize", "none", "--llm-quantize stores the language model's weights in fewer bits"),
    ("step_cache", NONE, "a language model has no denoising steps; leave it out"),
    ("compile", False, "leave it out"),
    ("cuda_graphs", False, "leave it out"),
)


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
    else:
        refuse_settings_of_pictures(config)
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


def refuse_settings_of_pictures(config: EngineConfig) -> None:
    """For an engine without a model of pictures. Raises: ConfigError for a setting that would do nothing there."""
    given = msgspec.structs.asdict(config)
    for name, unset, advice in _OF_PICTURES:
        if given[name] != unset:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for pictures and videos, and no such model is loaded: {advice}.",
                param=name,
            )
