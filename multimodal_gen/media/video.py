"""uint8 frames → the bytes of an MP4, WebM or GIF file, with the recipe in its metadata, and the stills beside it.

Equal inputs give equal bytes. Frames are taken one after another from any iterable, so that no second copy of a whole
video is held. As pictures do, every file carries the mark that says that a trained model made it: MP4 and GIF the XMP
packet, WebM, which has no place for one, the same address as a tag.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from multimodal_gen.media.encode import SOURCE_TYPE, XMP, encode_image
from multimodal_gen.media.recipe import Recipe, VideoFormat

VIDEO_SUFFIXES: dict[str, VideoFormat] = {".mp4": "mp4", ".webm": "webm", ".gif": "gif"}
"""file name suffix (lower case) → output_format"""

Frame = npt.NDArray[np.uint8]

# A fixed number of threads: how an encoder splits a picture among them shows in the bytes.
THREADS = 2
_CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "mp4": ("libx264", {"crf": "18", "preset": "medium"}),
    "webm": ("libvpx-vp9", {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "0"}),
}
BT709, MPEG_RANGE, FULL_RANGE = 1, 1, 2  # ISO/IEC 23091-2 and libav's numbers of ranges
# The identifier of XMP boxes in ISO media files (XMP specification, part 3).
_XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
SHEET_FRAMES = 25
SHEET_WIDTH = 160  # pixels of one frame


def write_video(
    path: Path,
    frames: Iterable[Frame],
    *,
    width: int,
    height: int,
    fps: int,
    output_format: VideoFormat,
    recipe: Recipe | None = None,
) -> None:
    """Write frames (uint8 [height, width, 3], RGB) to a file, which is replaced where it is there.

    Raises: OSError as the file system reports it.
    """
    assert width % 2 == 0, f"4:2:0 colour needs even sizes, got {width}x{height}"
    assert height % 2 == 0, f"4:2:0 colour needs even sizes, got {width}x{height}"
    if recipe is not None:
        recipe = msgspec.structs.replace(recipe, output_format=output_format)
    comment = None if recipe is None else recipe.to_json()
    if output_format == "gif":
        _write_gif(path, frames, fps, comment)
    else:
        _write_container(path, frames, (width, height), fps, output_format, comment)


def encode_video(
    frames: npt.NDArray[np.uint8], fps: int, output_format: VideoFormat, recipe: Recipe | None = None
) -> bytes:
    """One file's bytes for `frames` (uint8 [F, height, width, 3], RGB)."""
    _, height, width, _ = frames.shape
    # A real file: moving the index to the front, the muxer opens what it has written by its name.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video")
        write_video(path, frames, width=width, height=height, fps=fps, output_format=output_format, recipe=recipe)
        return path.read_bytes()


def thumbnail(frame: Frame) -> bytes:
    """A WebP picture of one frame."""
    return encode_image(frame, "webp", compression=85)


def sheet_indices(frames: int) -> list[int]:
    """Which of so many frames a sprite sheet shows: at most 25, evenly spread, the first and the last among them."""
    shown = min(frames, SHEET_FRAMES)
    return [round(i * (frames - 1) / max(shown - 1, 1)) for i in range(shown)]


def spritesheet(frames: list[Frame]) -> bytes:
    """A JPEG picture of frames in rows, as square a grid as their number allows."""
    from PIL import Image

    height, width = frames[0].shape[:2]
    tile = (min(width, SHEET_WIDTH), max(1, round(height * min(width, SHEET_WIDTH) / width)))
    columns = math.ceil(math.sqrt(len(frames)))
    sheet = Image.new("RGB", (columns * tile[0], math.ceil(len(frames) / columns) * tile[1]))
    for i, frame in enumerate(frames):
        small = Image.fromarray(np.ascontiguousarray(frame)).resize(tile, Image.Resampling.LANCZOS)
        sheet.paste(small, (i % columns * tile[0], i // columns * tile[1]))
    return encode_image(np.asarray(sheet), "jpeg", compression=85)


def _write_container(
    path: Path, frames: Iterable[Frame], size: tuple[int, int], fps: int, kind: VideoFormat, comment: str | None
) -> None:
    import av

    codec, options = _CODECS[kind]
    # faststart: the index comes before the pictures, so that players start before all of it is there.
    flags = {"movflags": "+faststart"} if kind == "mp4" else {}
    with av.open(str(path), "w", format=kind, container_options={"fflags": "+bitexact", **flags}) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        if kind == "webm":
            container.metadata["DIGITAL_SOURCE_TYPE"] = SOURCE_TYPE
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = THREADS
        # Said and done in BT.709: players guess by the size of the picture where a file says nothing.
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = MPEG_RANGE, *3 * (BT709,)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(
                format="yuv420p", dst_colorspace=BT709, dst_color_range=MPEG_RANGE, src_color_range=FULL_RANGE
            )
            picture.pts, picture.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    if kind == "mp4":
        with path.open("ab") as file:
            file.write((24 + len(XMP.encode())).to_bytes(4, "big") + b"uuid" + _XMP_BOX + XMP.encode())


def _write_gif(path: Path, frames: Iterable[Frame], fps: int, comment: str | None) -> None:
    import imageio.v3 as iio

    pictures = list(frames)
    # GIF counts hundredths of a second: rounding the times, not the lengths, keeps the whole as long as it should be.
    times = [round(100 * i / fps) for i in range(len(pictures) + 1)]
    lengths = [10 * max(2, after - before) for before, after in itertools.pairwise(times)]
    options: dict[str, Any] = {"duration": lengths if len(lengths) > 1 else lengths[0]}
    if comment is not None:
        options["comment"] = comment.encode("ascii")
    data = iio.imwrite("<bytes>", pictures, extension=".gif", plugin="pillow", loop=0, optimize=False, **options)
    # The packet is no chain of blocks; its 258 bytes of trailer lead every reader out of it.
    trailer = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
    assert data[-1:] == b";", "a GIF ends with a semicolon"
    path.write_bytes(data[:-1] + b"\x21\xff\x0bXMP DataXMP" + XMP.encode() + trailer + b";")


def read_comment(path: str) -> str | None:
    """The comment in an MP4, WebM or GIF file; None where there is none.

    Raises: OSError, ValueError for files that cannot be read.
    """
    with open(path, "rb") as file:
        is_gif = file.read(4) == b"GIF8"
    if is_gif:
        from PIL import Image

        with Image.open(path, formats=["GIF"]) as picture:
            found = picture.info.get("comment")
        return found.decode("ascii", "replace") if isinstance(found, bytes) else None
    import av

    with av.open(path) as container:
        metadata = {name.lower(): value for name, value in container.metadata.items()}
    return metadata.get("comment")
