"""How much memory the stages of a request work with beside the weights: estimates for the plan, in bytes.

Measured on a CPU (`RssAnon` at its highest, in bf16) and rounded up; docs/performance.md has the figures.
"""

from __future__ import annotations

import torch

from multimodal_gen import step_cache
from multimodal_gen.pipelines.stages.first_block import MOST_TOKENS
from multimodal_gen.request import ModelCard

OVERHEAD = 150_000_000  # scratch of matrix products, tables of positions, what allocators keep
PER_TOKEN = 56  # numbers for each one of the width of a transformer: queries, keys, values, hidden units, copies
IMAGE_VAE_PER_PIXEL = 700  # numbers, at the widest layer of a decoder that ends in full size
VIDEO_VAE_PER_PIXEL = 5_300  # numbers for every pixel of a frame: four frames at a time, and what convolutions remember


def of_denoising(tokens: int, width: int, dtype: torch.dtype) -> int:
    """A step over so many tokens."""
    return OVERHEAD + tokens * width * dtype.itemsize * PER_TOKEN


def of_step_cache(cache: str, tokens: int, width: int, patch: int, dtype: torch.dtype) -> int:
    """What one row remembers under a step cache, and, between the halves of a forward, its tokens once more: a bound.

    Args:
        tokens: of all branches.
        patch: numbers of the latents in a token.
    """
    wanted = step_cache.read(cache)
    if wanted is None:
        return 0
    known = (wanted.order + 1) * tokens * patch * torch.float32.itemsize
    if not isinstance(wanted, step_cache.FirstBlock):
        return known
    looked = min(tokens, 2 * MOST_TOKENS) * width * torch.float32.itemsize
    return known + looked + tokens * width * dtype.itemsize


def tokens_of(card: ModelCard, width: int, height: int, frames: int = 1) -> int:
    """What a step of one output is over, both branches of guidance included where the model's defaults have it."""
    group = 1 if card.video is None else card.video.frames_per_latent
    text = card.max_sequence_length if card.video is None else 0  # in one sequence with the picture
    one = width * height // card.pixels_per_token * ((frames - 1) // group + 1) + text
    return one * (2 if card.defaults.guidance_scale > card.guidance_threshold else 1)
