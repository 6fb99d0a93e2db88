"""What ranks share of the transformer under tensor parallelism."""

from __future__ import annotations

from multimodal_gen.parallel.tensor import COLUMN, HEADS, ROW, Rule
from multimodal_gen.pipelines.wan.config import WanConfig

# Embeddings and the time projection are every rank's own: a twentieth of the weights of the published models.
_BLOCKS = (
    Rule(r"blocks\.\d+\.attn1\.qkv", COLUMN),
    Rule(r"blocks\.\d+\.attn1\.qk_norm", HEADS),
    Rule(r"blocks\.\d+\.attn1\.out", ROW),
    Rule(r"blocks\.\d+\.attn2\.(q|kv)", COLUMN),
    Rule(r"blocks\.\d+\.attn2\.(q|k)_norm", HEADS),
    Rule(r"blocks\.\d+\.attn2\.out", ROW),
    Rule(r"blocks\.\d+\.ffn\.up", COLUMN),
    Rule(r"blocks\.\d+\.ffn\.down", ROW),
)
_IMAGE = (
    Rule(r"blocks\.\d+\.attn2\.image_kv", COLUMN),
    Rule(r"blocks\.\d+\.attn2\.image_k_norm", HEADS),
)


def sharding(config: WanConfig) -> tuple[Rule, ...]:
    """The table of a transformer."""
    return _BLOCKS if config.image_dim is None else _BLOCKS + _IMAGE
