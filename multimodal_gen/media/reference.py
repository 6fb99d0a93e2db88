"""A picture of a user → the plain RGB PNG that a video starts from.

What comes in may be hostile: the kind is told from the first bytes, so that no other decoder than the three asked for
ever runs, and the dimensions are checked before a pixel is decoded. What goes out holds pixels and nothing else. The
server decodes in a process of its own (`media.helper`); `to_reference` decodes here, for people's own pictures.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal_gen.errors import ImageTooLarge, InvalidImage, MmgenError, NotFound, UnsupportedImage

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MAX_BYTES = 50 * 2**20
MAX_PIXELS = 50_000_000  # phones take pictures of 48 megapixels
MAX_SIDE = 16_384
# The pictures are read once and thrown away: speed counts more than size.
PNG_LEVEL = 1

_KINDS = (("PNG", b"\x89PNG\r\n\x1a\n"), ("JPEG", b"\xff\xd8\xff"))
_FOREIGN = (
    ("GIF", b"GIF8"), ("TIFF", b"II*\0"), ("TIFF", b"MM\0*"), ("PSD", b"8BPS"), ("BMP", b"BM"), ("EPS", b"%!PS"),
    ("EPS", b"\xc5\xd0\xd3\xc6"), ("PDF", b"%PDF"), ("FITS", b"SIMPLE  ="), ("WMF", b"\xd7\xcd\xc6\x9a"),
    ("JPEG 2000", b"\0\0\0\x0cjP"), ("JPEG XL", b"\0\0\0\x0cJXL"), ("ICO", b"\0\0\x01\0"), ("JPEG XL", b"\xff\x0a"),
)  # fmt: skip
_MARKUP = (b"<svg", b"<?xml", b"<!doctype svg")
_WANTED = "Send a PNG, JPEG or WebP picture."


def to_reference(image: str | Path | bytes | Image.Image | np.ndarray) -> bytes:
    """The PNG for a file, its bytes, a PIL image, or an array: uint8 or float in 0 … 1, [H, W], [H, W, 3] or [H, W, 4].

    Raises: NotFound for a path without a file; the InvalidImage family.
    """
    if isinstance(image, (bytes, bytearray, memoryview)):
        return read_reference(bytes(image))
    if isinstance(image, (str, Path)):
        return read_reference(_read_file(Path(image)))
    from PIL import Image

    picture = image if isinstance(image, Image.Image) else _from_array(image)
    _check_size(picture.size)
    return _to_png(picture)


def read_reference(data: bytes, max_bytes: int = MAX_BYTES) -> bytes:
    """The PNG for the bytes of a PNG, JPEG or WebP file: its first frame, upright, in RGB over white.

    Raises: ImageTooLarge, UnsupportedImage, InvalidImage; never a decoder's own words, which may tell addresses.
    """
    if len(data) > max_bytes:
        raise too_many_bytes(max_bytes)
    kind = kind_of(data)
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            with Image.open(io.BytesIO(data), formats=[kind]) as picture:
                _check_size(picture.size)
                if kind == "PNG":
                    picture.verify()  # the decoder would not look at the checksums of pixels
            with Image.open(io.BytesIO(data), formats=[kind]) as picture:
                picture.load()
                return _to_png(picture)
    except MmgenError:
        raise
    except Image.DecompressionBombError:
        raise _too_many_pixels() from None
    except Exception:  # noqa: BLE001 - decoders fail in every way on damaged files, and all of them mean this
        raise InvalidImage(f"The picture is damaged: it cannot be read as {kind}. {_WANTED}", param="image") from None


def kind_of(data: bytes) -> str:
    """PIL's name of the format, from the first bytes. Raises: UnsupportedImage, InvalidImage."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for kind, magic in _KINDS:
        if data.startswith(magic):
            return kind
    foreign = next((kind for kind, magic in _FOREIGN if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        foreign = "AVIF or HEIC"
    elif data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        foreign = "SVG"
    if foreign is not None:
        raise UnsupportedImage(f"{foreign} pictures are not read. {_WANTED}", param="image")
    raise InvalidImage(
        f"This is not a picture. {_WANTED}" if data else f"The picture is empty. {_WANTED}", param="image"
    )


def too_many_bytes(limit: int) -> ImageTooLarge:
    """The error for a picture of more than `limit` bytes."""
    return ImageTooLarge(f"The picture is larger than {limit / 2**20:g} MiB, which is the limit.", param="image")


def _too_many_pixels() -> ImageTooLarge:
    return ImageTooLarge(
        f"The picture has too many pixels: at most {MAX_PIXELS:,} and {MAX_SIDE:,} on a side are read. Scale it down.",
        param="image",
    )


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_many_pixels()
    if not width or not height:
        raise InvalidImage("The picture has no pixels.", param="image")


def _read_file(path: Path) -> bytes:
    try:
        if os.stat(path).st_size > MAX_BYTES:
            raise too_many_bytes(MAX_BYTES)
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"There is no picture {path}.", param="image") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidImage(f"The picture {path} cannot be read: {reason}.", param="image") from None


def _from_array(values: Any) -> Image.Image:
    import numpy as np
    from PIL import Image

    array = np.asarray(values)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.dtype.kind not in "uf":
        raise InvalidImage(
            f"An array must be uint8 or float, [H, W], [H, W, 3] or [H, W, 4]; this is {array.dtype} "
            f"{list(array.shape)}.",
            param="image",
        )
    if array.dtype.kind == "f":
        if not (array.size and np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise InvalidImage("The numbers of a float picture must lie between 0 and 1.", param="image")
        array = (array * 255).round()
    elif array.dtype != np.uint8:
        raise InvalidImage(f"Whole numbers of a picture must be uint8, not {array.dtype}.", param="image")
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))


def _to_png(picture: Image.Image) -> bytes:
    from PIL import ImageOps

    upright = _to_rgb(ImageOps.exif_transpose(picture))
    upright.info.clear()
    buffer = io.BytesIO()
    upright.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _to_rgb(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits of grey: Pillow would clip them, not scale them
        import numpy as np

        return Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        shown = picture.convert("RGBA")
        white = Image.new("RGBA", shown.size, "white")
        return Image.alpha_composite(white, shown).convert("RGB")
    return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()
