"""Latents to pixels: our AutoencoderKL decoder against diffusers', whole pictures, in one process.

Random weights in the published shapes: Z-Image's (128, 256, 512, 512; 2 + 1 layers, attention in the middle) and half
of its width. In one process both sides have the same allocator and threads, so diffusers profits from ours. Before
timing, both must make the same picture. Wan's VAE is in `video.py`. The last line of stdout is JSON.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _common import Numbers, figure, finish, interleave, parser, record, same_picture, say
from _models import make_vae
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from multimodal_gen.config import EngineConfig
from multimodal_gen.memory.residency import Memory
from multimodal_gen.nn.precision import DTYPES
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.pipelines.contract import whole
from multimodal_gen.pipelines.registry import describe
from multimodal_gen.pipelines.vaes.kl import KLDecoder

GOALS = {"diffusers": 1.5}
SHAPES = {"Z-Image's": (128, 256, 512, 512), "half of these": (64, 128, 256, 256)}
CHANNELS, PIXELS_PER_LATENT = 16, 8
Decode = Callable[[Tensor], np.ndarray]  # latents [C, h, w] → uint8 [H, W, 3]


def main() -> None:
    """Run what the flags choose."""
    made = parser(__doc__ or "", repeats=5, max_seconds=300)
    made.add_argument("--side", type=int, default=512, help="pixels; default %(default)s")
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    flags = made.parse_args()
    environment = record(flags.threads)
    torch.set_num_threads(flags.threads)
    results: Numbers = {"side": flags.side, "dtype": flags.dtype}
    figures = []
    with torch.inference_mode():
        for name, widths in SHAPES.items():
            with tempfile.TemporaryDirectory(prefix="mmgen-bench-") as folder:
                theirs = make_vae(widths, seed=0).to(DTYPES[flags.dtype])
                theirs.save_pretrained(Path(folder, "vae"))
                sides = {"ours": ours(Path(folder), theirs.dtype), "diffusers": of_diffusers(theirs)}
                first = [decode(latents(flags.side, 0)) for decode in sides.values()]
                results[name] = same_picture(first[0], first[1], flags.dtype)
                say(f"{name}: {results[name]}")
                took = interleave(
                    {side: lambda i, d=decode: seconds(d, latents(flags.side, i)) for side, decode in sides.items()},
                    flags.repeats,
                    flags.max_seconds / len(SHAPES),
                )
            figures.append(figure(f"AutoencoderKL, {name} widths, {flags.side} x {flags.side}: decode", took, GOALS))
    finish("vae", environment, {**results, "figures": figures})


def ours(folder: Path, dtype: torch.dtype) -> Decode:
    """Of the folder that has vae/."""
    device = torch.device("cpu")
    config = EngineConfig(model_path="emoji-image")  # whose card says what sizes are usual; no weights of it are read
    memory = Memory(config, device, folder, Mesh.solo())
    decoder = KLDecoder(folder / "vae", sorted((folder / "vae").glob("*.safetensors")), device, dtype, memory)
    memory.load(describe(config), dtype, lambda *_: {})
    return lambda z: whole(decoder.decode(z))


def of_diffusers(model: AutoencoderKL) -> Decode:
    """As its pipelines do."""
    processor = VaeImageProcessor()

    def decode(z: Tensor) -> np.ndarray:
        scaled = z.to(model.dtype) / model.config.scaling_factor + model.config.shift_factor
        pixels = model.decode(scaled[None], return_dict=False)[0]
        return np.asarray(processor.postprocess(pixels, output_type="pil")[0])

    return decode


def latents(side: int, seed: int) -> Tensor:
    """float32 [C, h, w]."""
    size = side // PIXELS_PER_LATENT
    return torch.randn(CHANNELS, size, size, generator=torch.Generator().manual_seed(seed))


def seconds(decode: Decode, z: Tensor) -> float:
    """Of one picture."""
    begin = time.perf_counter()
    decode(z)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
