"""What tensors are called in GGUF files, and what transformers calls them, which is their name here. No torch here."""

from __future__ import annotations

import re

EMBEDDING, HEAD, FREQUENCIES = "model.embed_tokens.weight", "lm_head.weight", "rope_freqs.weight"

# Pattern of GGUF's name → template of transformers' name; the first row that matches counts.
GGUF_NAMES = (
    (r"token_embd\.weight", r"model.embed_tokens.weight"),
    (r"output_norm\.weight", r"model.norm.weight"),
    (r"output\.weight", r"lm_head.weight"),
    (r"rope_freqs\.weight", r"rope_freqs.weight"),
    (r"blk\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blk\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"blk\.(\d+)\.attn_output\.(weight|bias)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"blk\.(\d+)\.attn_([qk])_norm\.weight", r"model.layers.\1.self_attn.\2_norm.weight"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)", r"model.layers.\1.mlp.\2_proj.\3"),
)
PAIRED = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.(weight|bias)")  # `Family.gguf_pairs`


def canonical(name: str) -> str | None:
    """transformers' name of a tensor of a GGUF file; None for one that no family here has."""
    for pattern, template in GGUF_NAMES:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(template)
    return None
