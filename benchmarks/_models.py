"""Random-weight Z-Image checkpoints of a realistic size, and the prompts to feed them."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import _common  # noqa: F401  (makes tests.support importable)

HEADS, HEAD_DIM = 12, 128
RANK = 16  # of adapters
OBJECTS = ("red apple", "rocket", "pizza", "cat face", "red heart", "guitar", "soccer ball", "teapot", "tree", "crown")
COLOURS = ("blue", "yellow", "pink", "green", "purple", "orange", "light blue", "gray", "brown", "white", "black")


SIZES = ("a", "a small", "one", "one small")


def prompt(number: int) -> str:
    """The number-th of 440 different prompts: a new one for each repetition, so that no cache of conditions helps."""
    size = SIZES[number // (len(OBJECTS) * len(COLOURS)) % len(SIZES)]
    return f"{size} {OBJECTS[number % len(OBJECTS)]} on a {COLOURS[number % len(COLOURS)]} background"


def make_medium(
    folder: Path, *, layers: int = 12, refiner_layers: int = 2, text_layers: int = 20, seed: int = 0
) -> Path:
    """A ZImagePipeline folder in bf16, 1536 wide; with the default depth 478 M parameters in the transformer.

    The text encoder has the shape of Qwen3-0.6B, cut so that it is to the transformer what Z-Image's 4 B encoder is to
    its 6.2 B; the VAE is half as wide as Z-Image's.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    from tests.support.checkpoints import build, qwen_tokenizer

    tokenizer = qwen_tokenizer()
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=text_layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    transformer = build(
        lambda: ZImageTransformer2DModel(
            dim=HEADS * HEAD_DIM,
            n_layers=layers,
            n_refiner_layers=refiner_layers,
            n_heads=HEADS,
            n_kv_heads=HEADS,
            cap_feat_dim=text.hidden_size,
            rope_theta=256.0,
            axes_dims=[32, 48, 48],
            axes_lens=[1024, 512, 512],
        ),
        seed,
        gain=1.0,
    )
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=make_vae((64, 128, 256, 256), seed + 2),
        text_encoder=build(lambda: Qwen3Model(text), seed + 1, gain=1.0),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipe.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    del pipe, transformer
    gc.collect()
    return folder


def make_vae(widths: tuple[int, ...], seed: int) -> Any:
    """diffusers' AutoencoderKL of Z-Image's shape, with these widths."""
    from diffusers import AutoencoderKL

    from tests.support.checkpoints import build

    return build(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=32,
            sample_size=512,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=False,
        ),
        seed,
        gain=None,
    )


def make_wan_slice(folder: Path, *, layers: int, text_layers: int, seed: int = 0) -> Path:
    """A WanPipeline folder in the shape of Wan2.1 T2V 1.3B, cut to a few layers; bf16, the VAE in float32."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    from tests.support.checkpoints import build, t5_tokenizer

    tokenizer = t5_tokenizer()
    text = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=text_layers,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    transformer = build(
        lambda: WanTransformer3DModel(
            num_attention_heads=12,
            attention_head_dim=128,
            in_channels=16,
            out_channels=16,
            text_dim=4096,
            ffn_dim=8960,
            num_layers=layers,
        ),
        seed,
        gain=1.0,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build(lambda: UMT5EncoderModel(text), seed + 1, gain=1.0).to(torch.bfloat16),
        vae=build(lambda: AutoencoderKLWan(), seed + 2, gain=None),
        scheduler=scheduler,
        transformer=transformer.to(torch.bfloat16),
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    del pipe, transformer
    gc.collect()
    return folder


def make_deep(folder: Path, *, layers: int, text_layers: int = 4, seed: int = 0) -> Path:
    """As `make_medium`, but with one main layer of random weights, written `layers` times: gigabytes in seconds."""
    make_medium(folder, layers=1, text_layers=text_layers, seed=seed)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "n_layers": layers}))
    (file,) = (folder / "transformer").glob("*.safetensors")
    whole = file.with_suffix(".whole")
    _repeat(file, whole, "layers.0.", layers)
    whole.replace(file)
    return folder


def _repeat(source: Path, target: Path, prefix: str, count: int) -> None:
    """Copy a safetensors file; the tensors whose names begin with `prefix` come `count` times, numbered."""
    with source.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        start = 8 + length
        kept = [name for name in header if not name.startswith(("__", prefix))]
        names = [(name, name) for name in kept]
        for number in range(count):
            own = prefix.replace("0", str(number))
            names += [(own + name.removeprefix(prefix), name) for name in header if name.startswith(prefix)]
        made, end = {"__metadata__": {"format": "pt"}}, 0
        for name, like in names:
            begin, end = end, end + header[like]["data_offsets"][1] - header[like]["data_offsets"][0]
            made[name] = {**header[like], "data_offsets": [begin, end]}
        text = json.dumps(made).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, like in names:
                begin, end = header[like]["data_offsets"]
                file.seek(start + begin)
                out.write(file.read(end - begin))
            out.flush()
            os.fsync(out.fileno())  # only clean pages can be dropped from the cache


def make_adapters(model: Path, folder: Path) -> list[str]:
    """Three files in bf16, of rank 16, over every attention and feed-forward matrix of the main blocks."""
    import torch

    from multimodal_gen.weights.header import read_header
    from tests.support.adapters import peft_tensors, write_adapter

    header: dict[str, tuple[int, ...]] = {}
    for file in (model / "transformer").glob("*.safetensors"):
        header |= {name: info.shape for name, info in read_header(file, file.name).items()}
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in header.items()
        if name.startswith("layers.") and len(shape) == 2 and "adaLN" not in name
    }
    files = []
    for number in range(3):
        tensors = {n: t.to(torch.bfloat16) for n, t in peft_tensors(shapes, rank=RANK, seed=number).items()}
        files.append(str(write_adapter(folder / f"{number}.safetensors", tensors)))
    return files
