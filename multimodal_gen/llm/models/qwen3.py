"""Qwen3 (Yang et al., 2025): Llama with queries and keys normalised per head. No torch here."""

from __future__ import annotations

from multimodal_gen.llm.models import keys as common
from multimodal_gen.llm.models.config import DecoderConfig, Keys
from multimodal_gen.llm.models.family import Family


def _from_json(keys: Keys) -> DecoderConfig:
    common.refuse_window(keys)
    bias = keys.get("attention_bias", False)
    keys.need("head_dim", int)  # no quotient of width and heads in this family
    return common.from_json(keys, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _from_gguf(keys: Keys, vocab_size: int, tied: bool) -> DecoderConfig:
    return common.from_gguf(keys, "qwen3", vocab_size=vocab_size, tied=tied, qk_norm=True)


FAMILY = Family(
    name="qwen3", architectures=("Qwen3ForCausalLM",), gguf="qwen3", from_json=_from_json, from_gguf=_from_gguf
)
