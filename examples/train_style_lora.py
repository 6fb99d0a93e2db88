"""Trains a style adapter for the bundled model on its own pictures, passed through an image filter.

    pip install -c requirements/cpu.txt -e '.[train]'
    python examples/train_style_lora.py blueprint examples/loras/blueprint.safetensors
    mmgen generate "a rocket" --lora blueprint=examples/loras/blueprint.safetensors

Five to ten minutes on two cores. The pictures are made with multimodal_gen, the adapter is trained with peft on
diffusers' transformer (flow matching: the model learns clean - noise), and saved as diffusers saves it, so any program
that reads diffusers adapters can use the file.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps

from multimodal_gen import DiffGenerator
from multimodal_gen.weights.hub import ASSETS

MODEL = ASSETS / "emoji-image"
RANK = 8
TARGETS = (
    r"layers\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
    r"|all_x_embedder\.2-1|all_final_layer\.2-1\.linear"
)
DROPPED = 0.15  # share of training captions that are empty: guidance compares with the empty caption
OBJECTS = (
    "red apple", "rocket", "pizza", "cat face", "red heart", "guitar", "soccer ball", "teapot", "crown",
    "evergreen tree", "racing car", "police car", "bus", "grinning face", "crying face", "birthday cake", "fried egg",
    "turtle", "dog face", "banana", "sun", "rose", "fish", "airplane", "balloon", "hamburger", "blue heart",
)  # fmt: skip
COLOURS = ("white", "white", "blue", "yellow", "pink", "green", "purple", "orange", "light blue", "gray")


def blueprint(picture: Image.Image) -> Image.Image:
    """Blue ink on white paper. (The bundled VAE draws no sepia: it turns cream into pink.)"""
    return ImageOps.colorize(ImageOps.grayscale(picture), black="#101040", mid="#3060e0", white="#ffffff")


def pixel_art(picture: Image.Image) -> Image.Image:
    """Sixteen by sixteen squares of few, strong colours."""
    small = picture.resize((16, 16), Image.Resampling.BOX)
    few = ImageOps.posterize(small, 2).point(lambda level: level * 255 // 192)
    return few.resize(picture.size, Image.Resampling.NEAREST)


FILTERS: dict[str, Callable[[Image.Image], Image.Image]] = {"blueprint": blueprint, "pixel-art": pixel_art}


def main() -> None:
    """Make pictures, filter them, train, save."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("style", choices=FILTERS)
    flags.add_argument("output", type=Path)
    flags.add_argument("--pictures", type=int, default=192)
    flags.add_argument("--steps", type=int, default=1200)
    flags.add_argument("--batch", type=int, default=8)
    flags.add_argument("--learning-rate", type=float, default=2e-3)
    flags.add_argument("--seed", type=int, default=0)
    given = flags.parse_args()
    began = time.monotonic()
    prompts = make_prompts(given.pictures, given.seed)
    pictures = [FILTERS[given.style](picture) for picture in paint(prompts, given.seed)]
    print(f"{len(pictures)} pictures after {time.monotonic() - began:.0f} s")
    pipe = load()
    transformer = pipe.transformer
    latents, captions = encode(pipe, pictures, prompts)
    torch.manual_seed(given.seed)  # initial weights of the adapter, noise, times
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    train(transformer, latents, captions, given.steps, given.batch, given.learning_rate)
    save(pipe, given.output)
    size = given.output.stat().st_size
    print(f"{given.output}: {size / 1e6:.2f} MB after {time.monotonic() - began:.0f} s")


def make_prompts(count: int, seed: int) -> list[str]:
    """Prompts that the model knows, no two alike until all combinations are used."""
    order = np.random.default_rng(seed).permutation(len(OBJECTS) * len(COLOURS))
    prompts = []
    for number in itertools.islice(itertools.cycle(order), count):
        thing, colour = OBJECTS[number % len(OBJECTS)], COLOURS[number // len(OBJECTS)]
        prompts.append(thing if colour == "white" else f"{thing} on a {colour} background")
    return prompts


def paint(prompts: list[str], seed: int) -> list[Image.Image]:
    """One picture for each prompt, by the model as it is."""
    with DiffGenerator.from_pretrained("emoji-image", max_queue_cost=10**9) as gen:
        return [result.images[0] for result in gen.generate(prompts, seed=seed)]


def load() -> Any:
    """diffusers' pipeline in float32, nothing of it to be trained."""
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    return pipe


@torch.no_grad()
def encode(pipe: Any, pictures: list[Image.Image], prompts: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Latents [n, C, h, w] as the transformer sees them, and text features [l, D] of each prompt and of no prompt."""
    config = pipe.vae.config
    latents = []
    for picture in pictures:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents.append((pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor)
    captions, _ = pipe.encode_prompt([*prompts, ""], do_classifier_free_guidance=False)
    return torch.cat(latents), captions


def train(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    captions: list[torch.Tensor],
    steps: int,
    batch: int,
    learning_rate: float,
) -> None:
    """Flow matching: x = (1 - σ) clean + σ noise; the model is asked for clean - noise at time 1 - σ."""
    weights = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    mean, began = 0.0, time.monotonic()
    for step in range(steps):
        rows = torch.randint(len(latents), (batch,)).tolist()
        clean = latents[rows]
        told = [captions[-1 if torch.rand(()) < DROPPED else row] for row in rows]
        noise, sigma = torch.randn_like(clean), torch.rand(batch)
        sigma = 2 * sigma / (1 + sigma)  # the schedule's shift of 2: more of the noisy times, where colours are decided
        level = sigma.view(-1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = transformer(list(noisy.unsqueeze(2)), 1 - sigma, told)[0]
        predicted = torch.stack(list(outputs)).float().squeeze(2)
        loss = (predicted - (clean - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if step % 25 == 24:
            print(f"step {step + 1}: loss {mean:.4f}, {(time.monotonic() - began) / (step + 1):.2f} s/step", flush=True)


def save(pipe: Any, output: Path) -> None:
    """The adapter in float16, as diffusers writes it."""
    layers = {name: tensor.half() for name, tensor in get_peft_model_state_dict(pipe.transformer).items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    pipe.save_lora_weights(output.parent, transformer_lora_layers=layers, weight_name=output.name)


if __name__ == "__main__":
    main()
