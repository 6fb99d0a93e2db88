"""Which family runs which language model: one visible table, filled lazily. No torch here."""

from __future__ import annotations

import importlib

from multimodal_gen.errors import ConfigError
from multimodal_gen.llm.models.family import Family

FAMILIES = (
    "multimodal_gen.llm.models.llama",
    "multimodal_gen.llm.models.qwen2",
    "multimodal_gen.llm.models.qwen3",
)


def families() -> list[Family]:
    """All of them. An architecture that two of them claim is a bug."""
    found: list[Family] = [vars(importlib.import_module(module))["FAMILY"] for module in FAMILIES]
    names = [name for family in found for name in (*family.architectures, family.gguf)]
    assert len(names) == len(set(names)), f"two families claim one architecture: {names}"
    return found


def by_name(name: str) -> Family:
    """The family of a card."""
    return next(family for family in families() if family.name == name)


def by_architecture(architecture: str, shown: str) -> Family:
    """The family of `architectures` in config.json, or of `general.architecture` in GGUF. Raises: ConfigError."""
    for family in families():
        if architecture in family.architectures or architecture == family.gguf:
            return family
    known = ", ".join(name for family in families() for name in family.architectures)
    raise ConfigError(
        f"{shown}: the architecture {architecture[:80]!r} is not known here; known are {known}, and GGUF files of "
        f"{', '.join(family.gguf for family in families())}.",
        param="llm_path",
    )
