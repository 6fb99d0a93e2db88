"""Checkpoints of real size that take no room: headers, and files that are one hole. For plans; nothing computes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def hollow(make: Callable[[], nn.Module]) -> nn.Module:
    """A module without memory."""
    with torch.device("meta"):
        return make()


def write_hole(path: Path, module: nn.Module, without: tuple[str, ...] = ()) -> None:
    """A safetensors file with all tensors of `module` in bf16, full of zeros that no disk holds."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in module.state_dict().items():
        if name in without:
            continue
        begin, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


def make_wan_a14b(tiny: Path) -> Path:
    """Make a tiny Wan2.2 folder as large as Wan2.2-T2V-A14B: two experts of 28.6 GB, UMT5-XXL, the VAE."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    for name in ("transformer", "transformer_2"):
        config = json.loads((tiny / name / "config.json").read_text())
        config |= {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40, "ffn_dim": 13824}
        config |= {"text_dim": 4096, "freq_dim": 256}
        (tiny / name / "config.json").write_text(json.dumps(config))
        expert = hollow(lambda config=config: WanTransformer3DModel.from_config(config))
        write_hole(tiny / name / "diffusion_pytorch_model.safetensors", expert)
    path = tiny / "vae" / "config.json"
    config = json.loads(path.read_text()) | {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    path.write_text(json.dumps(config))
    vae = hollow(lambda: AutoencoderKLWan.from_config(config))
    write_hole(tiny / "vae" / "diffusion_pytorch_model.safetensors", vae)
    path = tiny / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config |= {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    path.write_text(json.dumps(config))
    encoder = hollow(lambda: UMT5EncoderModel(UMT5Config(**config)))
    write_hole(tiny / "text_encoder" / "model.safetensors", encoder, without=("encoder.embed_tokens.weight",))
    return tiny
