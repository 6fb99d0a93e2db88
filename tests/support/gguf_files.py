"""GGUF files as llama.cpp's converter writes them, from folders in transformers' format; and files made of bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from multimodal_gen.llm.models.names import PAIRED

# transformers' names → GGUF's, written out here and not derived from what is tested.
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OF_LAYERS = {
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{"self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def gguf_name(name: str) -> str:
    """What the converter calls a tensor of transformers."""
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    _, _, layer, own = module.split(".", 3)
    return f"blk.{layer}.{OF_LAYERS[own]}.{kind}"


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys, as the converter orders them for llama."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder: Path, path: Path, kind: str, extra: Mapping[str, np.ndarray] | None = None) -> Path:
    """The float32 model of a folder as a GGUF file; matrices are stored as `kind` ("Q4_1"), vectors as float32."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    writer = gguf.GGUFWriter(path, family)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    for name, weight in load_file(folder / "model.safetensors").items():
        if family == "llama" and PAIRED.fullmatch(name):
            is_query = ".q_proj." in name
            weight = in_pairs(weight, config["num_attention_heads" if is_query else "num_key_value_heads"])
        _add(writer, gguf_name(name), weight, kind if weight.ndim > 1 else "F32")
    for name, weight in (extra or {}).items():
        _add(writer, name, weight, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, weight: np.ndarray, kind: str) -> None:
    import gguf

    stored = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(weight, stored), raw_dtype=stored)


# --- bytes --------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """As the format writes it."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, raw: bytes) -> bytes:
    """A key with a value of a type that the format numbers."""
    return text(key) + struct.pack("<I", kind) + raw


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """What announces a tensor; the last dimension of rows comes first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def header(tensors: int, pairs: int, version: int = 3) -> bytes:
    """What a file begins with."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)
