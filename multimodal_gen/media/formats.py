"""What kinds of files there are for images and for videos, and one way to make them all."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from multimodal_gen.media.encode import EXTENSIONS, encode_image
from multimodal_gen.media.recipe import ImageFormat, Recipe, VideoFormat
from multimodal_gen.media.video import VIDEO_SUFFIXES, encode_video
from multimodal_gen.request import Media

Format = ImageFormat | VideoFormat

BY_SUFFIX: dict[Media, dict[str, Any]] = {"image": EXTENSIONS, "video": VIDEO_SUFFIXES}
"""media → suffix of a file → format; the first suffix of a format is the one of new files"""
DEFAULT: dict[Media, Format] = {"image": "png", "video": "mp4"}


def extension(output_format: Format) -> str:
    """The suffix of new files, without its dot."""
    suffixes = {kind: suffix for table in BY_SUFFIX.values() for suffix, kind in reversed(table.items())}
    return str(suffixes[output_format].removeprefix("."))


def encode(
    pixels: npt.NDArray[np.uint8], output_format: Any, *, fps: int | None, compression: int, recipe: Recipe | None
) -> bytes:
    """One file's bytes for uint8 [H, W, 3], or for [F, H, W, 3] at `fps`; `compression` is for images."""
    if fps is None:
        return encode_image(pixels, output_format, compression=compression, recipe=recipe)
    return encode_video(pixels, fps, output_format, recipe)
