"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases of queries, keys and values. No torch here."""

from __future__ import annotations

from multimodal_gen.llm.models import keys as common
from multimodal_gen.llm.models.config import DecoderConfig, Keys
from multimodal_gen.llm.models.family import Family


def _from_json(keys: Keys) -> DecoderConfig:
    common.refuse_window(keys)
    return common.from_json(keys, qkv_bias=True)


def _from_gguf(keys: Keys, vocab_size: int, tied: bool) -> DecoderConfig:
    return common.from_gguf(keys, "qwen2", vocab_size=vocab_size, tied=tied, qkv_bias=True)


FAMILY = Family(
    name="qwen2", architectures=("Qwen2ForCausalLM",), gguf="qwen2", from_json=_from_json, from_gguf=_from_gguf
)
