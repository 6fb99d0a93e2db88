"""Llama (Touvron et al., 2023) and what is built like it: SmolLM2, TinyLlama. No torch here."""

from __future__ import annotations

from multimodal_gen.llm.models import keys as common
from multimodal_gen.llm.models.config import DecoderConfig, Keys
from multimodal_gen.llm.models.family import Family


def _from_json(keys: Keys) -> DecoderConfig:
    bias = keys.get("attention_bias", False)
    return common.from_json(keys, qkv_bias=bias, out_bias=bias)


def _from_gguf(keys: Keys, vocab_size: int, tied: bool) -> DecoderConfig:
    return common.from_gguf(keys, "llama", vocab_size=vocab_size, tied=tied)


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    gguf="llama",
    from_json=_from_json,
    from_gguf=_from_gguf,
    gguf_pairs=True,  # llama.cpp turns neighbours, transformers the halves of a head
)
