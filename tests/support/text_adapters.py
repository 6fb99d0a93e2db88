"""Adapters of language models as peft writes them, and what peft computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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
