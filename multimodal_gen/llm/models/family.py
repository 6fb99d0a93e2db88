"""What a family of language models tells of itself. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from multimodal_gen.llm.models.config import DecoderConfig, Keys


@dataclass(frozen=True)
class Family:
    """One row of `registry.py`. All families use the names of tensors that `names.py` knows."""

    name: str
    architectures: tuple[str, ...]  # as in config.json
    gguf: str  # general.architecture of GGUF files, and the prefix of their keys
    from_json: Callable[[Keys], DecoderConfig]
    from_gguf: Callable[[Keys, int, bool], DecoderConfig]  # metadata, rows of the embedding, no output layer of its own
    gguf_pairs: bool = False  # rows of queries and keys stand in GGUF files in the order of neighbouring pairs
