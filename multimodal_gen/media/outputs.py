"""The shapes in which Python callers get their images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from multimodal_gen.errors import InvalidValue, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import torch

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_output(output_type: str, output_path: str | Path | None) -> None:
    """Raises: InvalidValue."""
    if output_type not in OUTPUT_TYPES:
        raise InvalidValue(
            f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}."
            + did_you_mean(str(output_type), OUTPUT_TYPES),
            param="output_type",
        )
    if output_type == "latent" and output_path is not None:
        raise InvalidValue(
            "output_path takes images and output_type='latent' makes none; leave one of them out.", param="output_path"
        )


def convert(pixels: np.ndarray, output_type: OutputType) -> Any:
    """uint8 [H, W, 3] as it is ("np"), as float [3, H, W] in 0 … 1 ("pt"), or as a PIL image ("pil")."""
    if output_type == "np":
        return pixels
    if output_type == "pt":
        import torch

        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    from PIL import Image

    return Image.fromarray(pixels)


def convert_frames(videos: Sequence[np.ndarray], output_type: OutputType) -> Any:
    """uint8 [F, H, W, 3] of several videos → uint8 [n, F, H, W, 3], or float [n, F, 3, H, W] in 0 … 1 for "pt"."""
    import numpy as np

    frames = np.stack(videos)
    if output_type != "pt":
        return frames
    import torch

    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255


def stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """Latents of several outputs, [C, h, w] or [C, f, h, w] → with n in front."""
    import torch

    return torch.stack([torch.from_numpy(array.copy()) for array in arrays])
