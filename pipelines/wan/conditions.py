"""What a request brings besides noise: its prompts, and the picture that its videos start from."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multimodal_gen.lora.applied import SetKey
from multimodal_gen.pipelines.contract import Conditions
from multimodal_gen.pipelines.wan.model import Context
from multimodal_gen.request import VideoRequest

ContextKey = tuple[str, tuple[tuple[SetKey, SetKey], ...], int]  # tree, adapters, guidance branch


@dataclass(frozen=True)
class Prompt:
    """One encoded prompt."""

    features: Tensor  # [l, text_dim], real tokens only
    pads: int  # zero vectors that follow them
    dropped: int  # tokens cut off at the end

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.features.nbytes


@dataclass(frozen=True)
class Start:
    """The picture of one request; filled by `encode`."""

    latents: Tensor  # what is concatenated to the noise [m + C, f, h, w], or the clean first frame [C, 1, h, w]
    tokens: Tensor | None  # of the image encoder [I, image_dim]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.latents.nbytes + (0 if self.tokens is None else self.tokens.nbytes)


@dataclass
class VideoConditions(Conditions):
    """Conditions of one request; its rows share them. Filled by encode."""

    request: VideoRequest | None = None  # whose they are
    branches: tuple[Prompt, ...] = ()  # the prompt, then the negative prompt under guidance
    start: Start | None = None
    contexts: dict[ContextKey, Context] = field(default_factory=dict)  # filled by denoise, where texts are kept

    def context(self, key: ContextKey, make: Callable[[], Context], *, keep: bool) -> Context:
        """A branch as the layers of a transformer see it; the same at every step."""
        if key in self.contexts:
            return self.contexts[key]
        context = make()
        if keep:
            self.contexts[key] = context
        return context


def open_picture(png: bytes) -> Image.Image:
    """`VideoRequest.image`, which is our own PNG."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        return image.convert("RGB")


def digest(png: bytes) -> str:
    """For caches of what a picture was encoded to."""
    return hashlib.sha256(png).hexdigest()


def pixels_of(image: Image.Image, width: int, height: int) -> Tensor:
    """A picture at the size of the video: float32 [3, 1, height, width] in -1 … 1."""
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255.0)
    return (2.0 * values - 1.0).permute(2, 0, 1)[:, None]


def first_frame_mask(frames: int, height: int, width: int, group: int) -> Tensor:
    """float32 [group, f, h, w]: 1 for the frames of each latent frame that are given, which is the first one alone.

    The first latent frame stands for one frame of the video; the mask counts it `group` times, as in training.
    """
    mask = torch.zeros(group, (frames - 1) // group + 1, height, width)
    mask[:, 0] = 1
    return mask
