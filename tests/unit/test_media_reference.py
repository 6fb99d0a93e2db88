"""Pictures of users: what is read comes out upright, in RGB, without metadata; what is hostile is refused by name."""

from __future__ import annotations

import asyncio
import contextlib
import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multimodal_gen.errors import ImageTooLarge, InvalidImage, MmgenError, NotFound, UnsupportedImage
from multimodal_gen.media.process import read_picture
from multimodal_gen.media.reference import MAX_PIXELS, read_reference, to_reference

pytestmark = [pytest.mark.unit]

HALVES = np.zeros((20, 40, 3), np.uint8)
HALVES[:, :20], HALVES[:, 20:] = (250, 10, 10), (10, 10, 250)
"""red on the left, blue on the right"""


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(**options: Any) -> bytes:
    return saved(Image.fromarray(HALVES), "PNG", **options)


def pixels(png: bytes) -> np.ndarray:
    """The array of a PNG that must be plain RGB without metadata."""
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode, image.info) == ("PNG", "RGB", {})
        return np.asarray(image)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of a few hundred bytes that would decode to gigabytes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_png_keeps_its_pixels() -> None:
    assert np.array_equal(pixels(read_reference(picture())), HALVES)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_pictures_are_read(kind: str) -> None:
    out = pixels(read_reference(saved(Image.fromarray(HALVES), kind, quality=95)))
    assert out.shape == HALVES.shape
    assert np.abs(out.astype(int) - HALVES).mean() < 8


def test_a_rotated_photograph_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it right
    exif[0x010E] = "where I live"
    out = pixels(read_reference(saved(Image.fromarray(HALVES), "JPEG", quality=95, exif=exif)))
    assert out.shape == (40, 20, 3)
    assert out[5, 10, 0] > 200, "red was left, so it is on top"
    assert out[35, 10, 2] > 200


def test_cmyk_keeps_its_colours() -> None:
    out = pixels(read_reference(saved(Image.fromarray(HALVES).convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(out.astype(int) - HALVES).mean() < 12


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = np.linspace(0, 65535, 40).astype(np.uint16).reshape(1, 40).repeat(20, 0)
    out = pixels(read_reference(saved(Image.fromarray(grey), "PNG")))
    assert np.array_equal(out[0, :, 0], grey[0] >> 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white(mode: str) -> None:
    image = Image.fromarray(HALVES).convert("RGBA")
    alpha = np.full((20, 40), 255, np.uint8)
    alpha[:, 20:] = 0
    image.putalpha(Image.fromarray(alpha))
    if mode == "P":
        palette = Image.fromarray((HALVES[:, :, 2] > 100).astype(np.uint8), "P")
        palette.putpalette([250, 10, 10, 10, 10, 250])
        data = saved(palette, "PNG", transparency=b"\xff\x00")
    else:
        data = saved(image.convert(mode), "PNG")
    out = pixels(read_reference(data))
    assert tuple(out[10, 30]) == (255, 255, 255)
    assert out[10, 10, 0] > 60


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert tuple(pixels(read_reference(data))[3, 3]) == (255, 0, 0)


def test_a_hundred_thousand_frames_cost_nothing() -> None:
    frame = chunk(b"fcTL", bytes(26)) + chunk(b"fdAT", bytes(8))
    data = picture()
    where = data.index(b"IDAT") - 4
    many = (
        data[:where] + chunk(b"acTL", struct.pack(">II", 100_000, 0)) + data[where:-12] + 100_000 * frame + data[-12:]
    )
    began = time.monotonic()
    with contextlib.suppress(InvalidImage):
        assert np.array_equal(pixels(read_reference(many)), HALVES)
    assert time.monotonic() - began < 5


def damaged_checksum() -> bytes:
    data = bytearray(picture())
    data[data.index(b"IDAT") + 8] ^= 0xFF
    return bytes(data)


BAD: list[tuple[str, Callable[[], bytes], type[MmgenError]]] = [
    ("bomb", bomb, ImageTooLarge),
    ("wide bomb", lambda: bomb(2**31 - 1, 1), ImageTooLarge),
    ("no pixels", lambda: bomb(0, 5), InvalidImage),
    ("truncated png", lambda: picture()[:-40], InvalidImage),
    ("truncated jpeg", lambda: saved(Image.fromarray(HALVES), "JPEG")[:-30], InvalidImage),
    ("truncated webp", lambda: saved(Image.fromarray(HALVES), "WEBP")[:-30], InvalidImage),
    ("checksum", damaged_checksum, InvalidImage),
    ("text named png", lambda: b"just some words", InvalidImage),
    ("head only", lambda: b"\x89PNG\r\n\x1a\n", InvalidImage),
    ("empty", lambda: b"", InvalidImage),
    ("eps", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run", UnsupportedImage),
    ("svg", lambda: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', UnsupportedImage),
    ("svg alone", lambda: b"  <SVG/>", UnsupportedImage),
    ("tiff", lambda: saved(Image.fromarray(HALVES), "TIFF"), UnsupportedImage),
    ("big-endian tiff", lambda: b"MM\0*" + bytes(100), UnsupportedImage),
    ("psd", lambda: b"8BPS\0\1" + bytes(100), UnsupportedImage),
    ("fits", lambda: b"SIMPLE  =                    T", UnsupportedImage),
    ("wmf", lambda: b"\xd7\xcd\xc6\x9a" + bytes(100), UnsupportedImage),
    ("gif", lambda: saved(Image.fromarray(HALVES), "GIF"), UnsupportedImage),
    ("avif", lambda: b"\0\0\0\x1cftypavif" + bytes(100), UnsupportedImage),
]


@pytest.mark.parametrize(("make", "kind"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_pictures_are_refused_by_name(make: Callable[[], bytes], kind: type[MmgenError]) -> None:
    with pytest.raises(kind) as caught:
        read_reference(make())
    assert type(caught.value) is kind
    assert " at 0x" not in caught.value.message


def test_foreign_kinds_reach_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a decoder was asked")

    monkeypatch.setattr(Image, "open", opened)
    for name, make, kind in BAD:
        if kind is UnsupportedImage:
            with pytest.raises(UnsupportedImage):
                read_reference(make())
            assert name


def test_too_many_bytes_are_refused_before_they_are_looked_at() -> None:
    with pytest.raises(ImageTooLarge, match="limit"):
        read_reference(picture(), max_bytes=10)


def test_the_limit_is_above_what_phones_take() -> None:
    assert MAX_PIXELS > 8064 * 6048


def test_python_callers_give_paths_images_and_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    for given in (path, str(path), picture(), Image.fromarray(HALVES), HALVES, HALVES / 255.0):
        assert np.array_equal(pixels(to_reference(given)), HALVES), type(given)
    assert pixels(to_reference(HALVES[:, :, 0])).shape == (20, 40, 3)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("missing.png", NotFound),
        (Path("/"), InvalidImage),
        (np.zeros((4, 4, 2), np.uint8), InvalidImage),
        (np.zeros((4, 4, 3), np.int64), InvalidImage),
        (np.full((4, 4, 3), 2.0), InvalidImage),
        (np.full((4, 4, 3), np.nan), InvalidImage),
        (np.zeros((0, 4, 3), np.uint8), InvalidImage),
    ],
    ids=["missing", "folder", "channels", "dtype", "range", "nan", "empty"],
)
def test_python_callers_are_told_what_is_wrong(given: Any, kind: type[MmgenError]) -> None:
    with pytest.raises(kind):
        to_reference(given)


# --- in a process of its own ----------------------------------------------------------------------------------------


def test_a_helper_process_reads_the_same() -> None:
    assert asyncio.run(read_picture(picture(), 10**6)) == read_reference(picture())


def test_a_helper_process_refuses_the_same() -> None:
    with pytest.raises(ImageTooLarge):
        asyncio.run(read_picture(bomb(), 10**6))
    with pytest.raises(UnsupportedImage):
        asyncio.run(read_picture(b"8BPS", 10**6))


def test_a_helper_that_takes_too_long_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    from multimodal_gen.media import process

    monkeypatch.setattr(process, "PICTURE_S", 0.01)
    with pytest.raises(InvalidImage, match="too much time"):
        asyncio.run(read_picture(picture(), 10**6))
