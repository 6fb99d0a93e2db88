"""Where the decoder keeps the tensors of a checkpoint, and what ranks share of it; the same for all families."""

from __future__ import annotations

from multimodal_gen.llm.models.config import DecoderConfig
from multimodal_gen.parallel.tensor import COLUMN, ROW, Rule
from multimodal_gen.weights.loading import Rename

_LAYER = r"model\.(layers\.\d+)\."
RENAMES = (
    Rename(r"model\.embed_tokens\.weight", r"embedding.weight"),
    Rename(r"model\.norm\.weight", r"norm.weight"),
    Rename(r"lm_head\.weight", r"head.weight"),
    Rename(r"rope_freqs\.weight", r"rope.factors"),
    Rename(_LAYER + r"input_layernorm\.weight", r"\1.attention_norm.weight"),
    Rename(_LAYER + r"post_attention_layernorm\.weight", r"\1.mlp_norm.weight"),
    Rename(_LAYER + r"self_attn\.([qkv])_proj\.(weight|bias)", r"\1.attention.qkv.\3", r"\2"),
    Rename(_LAYER + r"self_attn\.o_proj\.(weight|bias)", r"\1.attention.out.\2"),
    Rename(_LAYER + r"self_attn\.([qk])_norm\.weight", r"\1.attention.norm.\2.weight"),
    Rename(_LAYER + r"mlp\.(gate|up)_proj\.weight", r"\1.mlp.gate_up.weight", r"\2"),
    Rename(_LAYER + r"mlp\.down_proj\.weight", r"\1.mlp.down.weight"),
)
_COMPUTED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # old folders have it
_HEAD = r"lm_head\.weight"


def ignored(config: DecoderConfig) -> tuple[str, ...]:
    """Patterns of tensors that the decoder has no use for; some folders hold a tied layer twice."""
    return (_COMPUTED, _HEAD) if config.tied else (_COMPUTED,)


def sharding(config: DecoderConfig, ranks: int) -> tuple[Rule, ...]:
    """A vocabulary that the ranks cannot share equally is held by each of them."""
    shared = config.vocab_size % ranks == 0
    vocabulary = (Rule(r"embedding" if config.tied else r"embedding|head", ROW),) if shared else ()
    return (
        *vocabulary,
        Rule(r"layers\.\d+\.attention\.qkv", COLUMN),
        Rule(r"layers\.\d+\.attention\.out", ROW),
        Rule(r"layers\.\d+\.mlp\.gate_up", COLUMN),
        Rule(r"layers\.\d+\.mlp\.down", ROW),
    )
