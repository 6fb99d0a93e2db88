"""Adapters of language models as peft writes them, and what peft computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from multimodal_gen.llm.models.config import DecoderConfig
from tests.support.adapters import peft_tensors, write_adapter

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_peft(
    model: Any,
    folder: Path,
    *,
    seed: int,
    targets: Sequence[str] = ALL,
    rank: int = 4,
    size: float = 3.0,
    **options: Any,
) -> Path:
    """An adapter with random weights for a model of transformers, which is left as it was.

    `size`: how far it is from doing nothing; large enough to change what a tiny random model says. `options` are
    peft's.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * size / tensor.shape[1] ** 0.5)
    wrapped.save_pretrained(folder)
    wrapped.unload()
    return folder


def with_peft(model: Any, folder: Path) -> Any:
    """The model with an adapter, as peft computes it; `unload` on the result makes the model as it was."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).eval()


def write_random(path: Path, config: DecoderConfig, *, seed: int, rank: int = 4, size: float = 3.0) -> Path:
    """An adapter of all linear layers, without peft."""
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (heads, config.width),
        "self_attn.k_proj": (kv_heads, config.width),
        "self_attn.v_proj": (kv_heads, config.width),
        "self_attn.o_proj": (config.width, heads),
        "mlp.gate_proj": (config.hidden, config.width),
        "mlp.up_proj": (config.hidden, config.width),
        "mlp.down_proj": (config.width, config.hidden),
    }
    every = {f"layers.{layer}.{name}": shape for layer in range(config.layers) for name, shape in shapes.items()}
    return write_adapter(path, peft_tensors(every, rank=rank, seed=seed, prefix="base_model.model.model.", size=size))


def write_poet(folder: Path) -> Path:
    """`poet.safetensors`, which changes two layers of SmolLM2 a little; returns the folder."""
    shapes = {f"layers.{layer}.self_attn.q_proj": (576, 576) for layer in range(2)}
    tensors = peft_tensors(shapes, rank=8, prefix="base_model.model.model.", size=0.1)
    write_adapter(folder / "poet.safetensors", tensors)
    return folder
