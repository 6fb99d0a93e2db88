"""Tiny seeded Wan checkpoints in diffusers format, one function for all published layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from tests.support.checkpoints import build, t5_tokenizer

Variant = Literal["t2v", "i2v", "t2v_a14b", "i2v_a14b", "ti2v_5b"]
VARIANTS: tuple[Variant, ...] = ("t2v", "i2v", "t2v_a14b", "i2v_a14b", "ti2v_5b")
Solver = Literal["unipc", "euler"]


def make_wan(
    folder: Path,
    variant: Variant = "t2v",
    *,
    seed: int = 0,
    heads: int = 4,
    head_dim: int = 24,
    layers: int = 2,
    ffn: int = 192,
    solver: Solver = "unipc",
    shift: float = 3.0,
    boundary: float | None = None,
    max_shard_size: str | None = None,
) -> Path:
    """A WanPipeline or WanImageToVideoPipeline folder; `boundary` replaces the published ratio of the A14B models."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    tokenizer = t5_tokenizer()
    dim, two = heads * head_dim, variant.endswith("a14b")
    from_image = variant.startswith("i2v")
    latent = 48 if variant == "ti2v_5b" else 16
    sizes: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 36 if from_image else latent,
        "out_channels": latent,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }
    if variant == "i2v":
        sizes |= {"image_dim": 32, "added_kv_proj_dim": dim}
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": _umt5(tokenizer, seed + 1),
        "vae": _vae_5b(seed + 2) if variant == "ti2v_5b" else _vae(seed + 2),
        "scheduler": _scheduler(solver, shift),
        "transformer": _transformer(sizes, seed),
    }
    if two:
        parts["transformer_2"] = _transformer(sizes, seed + 10)
        parts["boundary_ratio"] = boundary or (0.9 if from_image else 0.875)
    if variant == "ti2v_5b":
        parts["expand_timesteps"] = True
    if from_image:
        parts |= {"image_processor": None, "image_encoder": None}
    if variant == "i2v":
        parts |= _clip(seed + 3)
    pipe = (WanImageToVideoPipeline if from_image else WanPipeline)(**parts)
    pipe.save_pretrained(
        folder, safe_serialization=True, **({"max_shard_size": max_shard_size} if max_shard_size else {})
    )
    _published_names(folder)
    return folder


def _published_names(folder: Path) -> None:
    """Without torchvision, transformers writes its fallbacks' class names; published folders have the plain ones."""
    for file in (folder / "model_index.json", *folder.glob("image_processor/*.json")):
        file.write_text(file.read_text().replace("ProcessorPil", "Processor"))


def _transformer(sizes: dict[str, Any], seed: int) -> Any:
    from diffusers import WanTransformer3DModel

    return build(lambda: WanTransformer3DModel(**sizes), seed)


def _umt5(tokenizer: Any, seed: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    return build(lambda: UMT5EncoderModel(config), seed)


def _vae(seed: int) -> Any:
    from diffusers import AutoencoderKLWan

    return build(
        lambda: AutoencoderKLWan(
            base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        seed,
        gain=None,
    )


def _vae_5b(seed: int) -> Any:
    """2 x 2 pixel patches, residual blocks, 48 channels, 16 times smaller."""
    from diffusers import AutoencoderKLWan

    generator = torch.Generator().manual_seed(seed)
    mean = (torch.randn(48, generator=generator) * 0.2).tolist()
    std = (torch.rand(48, generator=generator) * 0.5 + 0.5).tolist()
    return build(
        lambda: AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=48,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=16,
            scale_factor_temporal=4,
            latents_mean=mean,
            latents_std=std,
        ),
        seed,
        gain=None,
    )


def _scheduler(solver: Solver, shift: float) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


def _clip(seed: int) -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        hidden_act="gelu",
    )
    return {
        "image_processor": CLIPImageProcessor(crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32}),
        "image_encoder": build(lambda: CLIPVisionModelWithProjection(config), seed),
    }
