"""From diffusers' names of the transformer's tensors to ours."""

from __future__ import annotations

from multimodal_gen.weights.loading import Rename

RENAMES = (
    Rename(r"(.+\.attn1)\.to_(q|k|v)\.(weight|bias)", r"\1.qkv.\3", r"\2"),
    Rename(r"(.+\.attn1)\.norm_(q|k)\.weight", r"\1.qk_norm.weight", r"\2"),
    Rename(r"(.+\.attn2)\.to_q\.(weight|bias)", r"\1.q.\2"),
    Rename(r"(.+\.attn2)\.to_(k|v)\.(weight|bias)", r"\1.kv.\3", r"\2"),
    Rename(r"(.+\.attn2)\.add_(k|v)_proj\.(weight|bias)", r"\1.image_kv.\3", r"\2"),
    Rename(r"(.+\.attn2)\.norm_(q|k)\.weight", r"\1.\2_norm.weight", r"\2"),
    Rename(r"(.+\.attn2)\.norm_added_k\.weight", r"\1.image_k_norm.weight", "k"),
    Rename(r"(.+\.attn[12])\.to_out\.0\.(weight|bias)", r"\1.out.\2"),
    Rename(r"(.+)\.ffn\.net\.0\.proj\.(weight|bias)", r"\1.ffn.up.\2"),
    Rename(r"(.+)\.ffn\.net\.2\.(weight|bias)", r"\1.ffn.down.\2"),
    Rename(r"condition_embedder\.time_embedder\.linear_1\.(weight|bias)", r"time_in.\1"),
    Rename(r"condition_embedder\.time_embedder\.linear_2\.(weight|bias)", r"time_out.\1"),
    Rename(r"condition_embedder\.time_proj\.(weight|bias)", r"time_proj.\1"),
    Rename(r"condition_embedder\.text_embedder\.linear_1\.(weight|bias)", r"text_in.\1"),
    Rename(r"condition_embedder\.text_embedder\.linear_2\.(weight|bias)", r"text_out.\1"),
    Rename(r"condition_embedder\.image_embedder\.norm(1|2)\.(weight|bias)", r"image_embedder.norm\1.\2"),
    Rename(r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.(weight|bias)", r"image_embedder.up.\1"),
    Rename(r"condition_embedder\.image_embedder\.ff\.net\.2\.(weight|bias)", r"image_embedder.down.\1"),
)
# Early conversions carry a norm for queries of image tokens, which do not exist.
IGNORED = (r".+\.norm_added_q\.weight",)
