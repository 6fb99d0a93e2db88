"""Folders with random weights, drawn on the GPU: the true Z-Image, the one of 478 M, and Qwen3-0.6B's shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _common  # noqa: F401  (makes tests.support importable)
import torch
from torch import Tensor, nn

SHARD_BYTES = 3 << 30
TEXT_WIDTH = 1024
SHAPES: dict[str, dict[str, Any]] = {
    # transformer, widths of the VAE, layers of the text encoder
    "6b": {"dim": 3840, "n_heads": 30, "n_layers": 30, "n_refiner_layers": 2, "vae": (128, 256, 512, 512), "text": 20},
    "478m": {"dim": 1536, "n_heads": 12, "n_layers": 12, "n_refiner_layers": 2, "vae": (64, 128, 256, 256), "text": 20},
    "tiny": {"dim": 256, "n_heads": 2, "n_layers": 2, "n_refiner_layers": 1, "vae": (32, 64, 64, 64), "text": 2},
}
QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_picture_model(folder: Path, name: str, device: str) -> Path:
    """A ZImagePipeline folder in bfloat16 of a row of `SHAPES`; the text encoder is as wide as Qwen3-0.6B."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    from tests.support.checkpoints import qwen_tokenizer

    shape = dict(SHAPES[name])
    widths, layers, tokenizer = shape.pop("vae"), shape.pop("text"), qwen_tokenizer()
    text = Qwen3Config(
        **{**QWEN3, "vocab_size": len(tokenizer), "num_hidden_layers": layers, "max_position_embeddings": 2048}
    )
    with torch.device("meta"):
        parts = {
            "transformer": ZImageTransformer2DModel(
                **shape, n_kv_heads=shape["n_heads"], cap_feat_dim=TEXT_WIDTH, rope_theta=256.0,
                axes_dims=[32, 48, 48], axes_lens=[1024, 512, 512],
            ),
            "text_encoder": Qwen3Model(text),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=widths, layers_per_block=2, latent_channels=16, norm_num_groups=32,
                sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                use_post_quant_conv=False, force_upcast=False,
            ),
        }  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    for part, model in parts.items():
        _write(folder / part, model, "model" if part == "text_encoder" else "diffusion_pytorch_model", generator)
    tokenizer.save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_text_model(folder: Path, device: str, layers: int = QWEN3["num_hidden_layers"]) -> Path:
    """A folder of Qwen3-0.6B's shape in bfloat16, or of fewer layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.checkpoints import qwen_tokenizer

    config = AutoConfig.for_model("qwen3", **{**QWEN3, "num_hidden_layers": layers})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    qwen_tokenizer().save_pretrained(folder)
    return folder


def _write(folder: Path, model: nn.Module, name: str, generator: torch.Generator) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    values = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    kept = {key: value for key, value in values.items() if not key.startswith("_")}
    (folder / "config.json").write_text(json.dumps({"_class_name": type(model).__name__, **kept}, default=str))
    index: dict[str, str] = {}
    shards = list(_shards(model.state_dict(), generator))
    for number, tensors in enumerate(shards):
        file = f"{name}.safetensors" if len(shards) == 1 else f"{name}-{number:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        whole = {"metadata": {"total_size": sum(2 * p.numel() for p in model.state_dict().values())}}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps({**whole, "weight_map": index}))


def _shards(state: dict[str, Tensor], generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    made, size = dict[str, Tensor](), 0
    for name, like in state.items():
        made[name] = _drawn(name, like, generator).cpu().contiguous()
        size += made[name].nbytes
        if size > SHARD_BYTES:
            yield made
            made, size = {}, 0
    if made:
        yield made


def _drawn(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Matrices that keep the scale of what they multiply, norms around one."""
    x = torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
    if "pad" in name:
        return x * 0.1
    if like.dim() >= 2:
        return x * like[0].numel() ** -0.5
    return x * 0.05 if name.endswith("bias") else 1 + x * 0.1
