"""Model folders made of bytes alone, for tests of what reads headers and never loads a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Tensors = dict[str, tuple[str, list[int], bytes]]  # name → (dtype, shape, data)


def safetensors_bytes(tensors: Tensors) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(header, data)


def with_header(header: Any, data: bytes) -> bytes:
    """A safetensors file with any header, sound or not."""
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def write_json(path: Path, content: Any) -> None:
    """Write JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_model(folder: Path, pipeline_class: str = "FluxPipeline") -> Path:
    """A sound folder: a sharded transformer (3 tensors, 2 files), a VAE, a tokenizer and a scheduler."""
    write_json(
        folder / "model_index.json",
        {
            "_class_name": pipeline_class,
            "_diffusers_version": "0.42.1",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "image_encoder": [None, None],
            "boundary_ratio": 0.875,
        },
    )
    write_json(folder / "scheduler" / "scheduler_config.json", {"shift": 3.0})
    write_json(folder / "tokenizer" / "tokenizer_config.json", {})
    write_json(folder / "tokenizer" / "vocab.json", {"a": 0})
    write_json(folder / "vae" / "config.json", {"block_out_channels": [8, 8, 16, 16]})
    write_json(folder / "transformer" / "config.json", {"dim": 4})
    base = "diffusion_pytorch_model"
    (folder / "vae" / f"{base}.safetensors").write_bytes(safetensors_bytes({"w": ("BF16", [2, 3], bytes(12))}))
    shards: dict[str, Tensors] = {
        f"{base}-00001-of-00002.safetensors": {"a": ("F32", [4], bytes(16)), "b": ("F16", [2, 2], bytes(8))},
        f"{base}-00002-of-00002.safetensors": {"c": ("F32", [], bytes(4))},
    }
    for name, tensors in shards.items():
        (folder / "transformer" / name).write_bytes(safetensors_bytes(tensors))
    where = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    write_json(folder / "transformer" / f"{base}.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return folder
