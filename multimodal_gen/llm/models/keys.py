"""Configuration keys that the families have in common: those of transformers, and those of GGUF. No torch here."""

from __future__ import annotations

import math

from multimodal_gen.errors import CorruptModel
from multimodal_gen.llm.models.config import DecoderConfig, Keys, RopeConfig, RopeScaling, unsupported

KINDS = ("default", "linear", "llama3", "yarn")


def from_json(keys: Keys, *, qkv_bias: bool = False, out_bias: bool = False, qk_norm: bool = False) -> DecoderConfig:
    """From config.json. Raises: CorruptModel, ConfigError for what the decoder does not compute."""
    if keys.get("hidden_act", "silu") != "silu":
        raise unsupported(f"hidden_act is {keys.get('hidden_act', 'silu')!r}")
    if keys.get("mlp_bias", False):
        raise unsupported("mlp_bias is set")
    keys.all_of("layer_types", ("full_attention",))
    width, heads = keys.need("hidden_size", int), keys.need("num_attention_heads", int)
    head_dim = keys.get("head_dim", width // max(1, heads))
    context = keys.need("max_position_embeddings", int)
    rope = _rope(keys, head_dim, context)
    return DecoderConfig(
        vocab_size=keys.need("vocab_size", int),
        width=width,
        layers=keys.need("num_hidden_layers", int),
        heads=heads,
        kv_heads=keys.get("num_key_value_heads", heads),
        head_dim=head_dim,
        hidden=keys.need("intermediate_size", int),
        eps=keys.get("rms_norm_eps", 1e-6),
        context=_stretched(context, rope.scaling),
        rope=rope,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=qk_norm,
        tied=keys.get("tie_word_embeddings", False),
    )


def refuse_window(keys: Keys) -> None:
    """Raises: ConfigError for a model whose attention slides."""
    if keys.get("use_sliding_window", False):
        raise unsupported("use_sliding_window is set")


def _rope(keys: Keys, head_dim: int, context: int) -> RopeConfig:
    new = keys.table("rope_parameters")  # transformers 5 keeps theta inside
    if new is not None and new.nested:
        raise unsupported("rope_parameters differ by layer")
    theta = (new or keys).get("rope_theta", keys.get("rope_theta", 10_000.0))
    scaling = new or keys.table("rope_scaling")
    dim = int(head_dim * (scaling or keys).get("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0)))
    return RopeConfig(theta, dim, None if scaling is None else _scaling(scaling, context))


def _scaling(keys: Keys, context: int) -> RopeScaling | None:
    kind = keys.get("rope_type", keys.get("type", "default"))
    if kind not in KINDS:
        # dynamic: frequencies would depend on a sequence's length, and keys in pages were turned by others.
        raise unsupported(f"rope_scaling has type {kind!r} (known: {', '.join(KINDS)})")
    if kind == "default":
        return None
    original = keys.get("original_max_position_embeddings", context)
    factor = keys.need("factor", float) if kind != "yarn" or "factor" in keys else context / max(1, original)
    if factor < 1 or original < 1:
        raise CorruptModel(f"rope_scaling: factor {factor} and original context {original} cannot be.")
    if kind == "linear":
        return RopeScaling("linear", factor, original)
    if kind == "llama3":
        low, high = keys.need("low_freq_factor", float), keys.need("high_freq_factor", float)
        if not 0 < low < high:
            raise CorruptModel(f"rope_scaling: low_freq_factor {low} must be below high_freq_factor {high}.")
        return RopeScaling("llama3", factor, original, low=low, high=high)
    return _yarn(keys, factor, original)


def _yarn(keys: Keys, factor: float, original: int) -> RopeScaling:
    fast, slow = keys.get("beta_fast", 32.0), keys.get("beta_slow", 1.0)
    if not 0 < slow < fast:
        raise CorruptModel(f"rope_scaling: beta_slow {slow} must be below beta_fast {fast}.")
    if "mscale" in keys or "mscale_all_dim" in keys:
        raise unsupported("rope_scaling has mscale")
    attention = keys.get("attention_factor", yarn_attention(factor))
    truncate = keys.get("truncate", True)
    return RopeScaling(
        "yarn", factor, original, beta_fast=fast, beta_slow=slow, attention_factor=attention, truncate=truncate
    )


def yarn_attention(factor: float) -> float:
    """What YaRN multiplies cosines and sines by (Peng et al., 2023, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def _stretched(context: int, scaling: RopeScaling | None) -> int:
    """Some folders say the context before scaling, some the one after it; llama3 says the one after."""
    if scaling is None or scaling.kind == "llama3":
        return context
    return max(context, int(scaling.factor * scaling.original))


def from_gguf(
    keys: Keys, prefix: str, *, vocab_size: int, tied: bool, qkv_bias: bool = False, qk_norm: bool = False
) -> DecoderConfig:
    """From GGUF metadata.

    Args:
        prefix: of the architecture's keys.
        vocab_size: rows of the embedding.
        tied: whether the file has no output layer of its own.

    Raises: CorruptModel, ConfigError for what the decoder does not compute.
    """

    def own(name: str) -> str:
        return f"{prefix}.{name}"

    width, heads = keys.need(own("embedding_length"), int), keys.need(own("attention.head_count"), int)
    head_dim = keys.get(own("attention.key_length"), width // max(1, heads))
    if keys.get(own("attention.value_length"), head_dim) != head_dim:
        raise unsupported(f"{own('attention.value_length')} differs from the length of keys")
    if own("attention.sliding_window") in keys:
        raise unsupported(f"{own('attention.sliding_window')} is set")
    if keys.get(own("expert_count"), 0):
        raise unsupported(f"{own('expert_count')} is set")
    context = keys.need(own("context_length"), int)
    dim = keys.get(own("rope.dimension_count"), head_dim)
    theta = keys.get(own("rope.freq_base"), 10_000.0)
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        layers=keys.need(own("block_count"), int),
        heads=heads,
        kv_heads=keys.get(own("attention.head_count_kv"), heads),
        head_dim=head_dim,
        hidden=keys.need(own("feed_forward_length"), int),
        eps=keys.need(own("attention.layer_norm_rms_epsilon"), float),
        context=context,
        rope=RopeConfig(theta, dim, _gguf_scaling(keys, prefix, context)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied=tied,
    )


def _gguf_scaling(keys: Keys, prefix: str, context: int) -> RopeScaling | None:
    """llama3's scaling is not here: it comes as a tensor of divisors (`RopeConfig.factors`)."""
    kind = keys.get(f"{prefix}.rope.scaling.type", "none")
    factor = keys.get(f"{prefix}.rope.scaling.factor", 1.0)
    original = keys.get(f"{prefix}.rope.scaling.original_context_length", context)
    if kind == "none" or factor == 1.0:
        return None
    if kind not in ("linear", "yarn") or factor < 1 or original < 1:
        raise unsupported(f"{prefix}.rope.scaling has type {kind!r}, factor {factor}")
    if kind == "linear":
        return RopeScaling("linear", factor, original)
    return RopeScaling("yarn", factor, original, attention_factor=yarn_attention(factor))
