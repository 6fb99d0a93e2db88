"""From diffusers' names of the transformer's tensors to ours."""

from __future__ import annotations

from multimodal_gen.weights.loading import Rename

RENAMES = (
    Rename(r"(.+\.attention)\.to_(q|k|v)\.weight", r"\1.qkv.weight", r"\2"),
    Rename(r"(.+\.attention)\.norm_(q|k)\.weight", r"\1.qk_norm.weight", r"\2"),
    Rename(r"(.+\.attention)\.to_out\.0\.weight", r"\1.out.weight"),
    Rename(r"(.+\.feed_forward)\.w1\.weight", r"\1.gate_up.weight", "gate"),
    Rename(r"(.+\.feed_forward)\.w3\.weight", r"\1.gate_up.weight", "up"),
    Rename(r"(.+\.feed_forward)\.w2\.weight", r"\1.down.weight"),
    Rename(r"all_x_embedder\.\d+-1\.(weight|bias)", r"image_embedder.\1"),
    Rename(r"all_final_layer\.\d+-1\.adaLN_modulation\.1\.(weight|bias)", r"final.modulation.\1"),
    Rename(r"all_final_layer\.\d+-1\.linear\.(weight|bias)", r"final.linear.\1"),
    Rename(r"(.+)\.adaLN_modulation\.0\.(weight|bias)", r"\1.modulation.\2"),
    Rename(r"t_embedder\.mlp\.0\.(weight|bias)", r"time_in.\1"),
    Rename(r"t_embedder\.mlp\.2\.(weight|bias)", r"time_out.\1"),
    Rename(r"cap_embedder\.0\.weight", "caption_norm.weight"),
    Rename(r"cap_embedder\.1\.(weight|bias)", r"caption_embedder.\1"),
    Rename(r"x_pad_token", "image_pad"),
    Rename(r"cap_pad_token", "caption_pad"),
)
