"""Forms, ranges and data URLs: what clients send is read as they meant it, or refused by name, within bounds."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest

from multimodal_gen.errors import (
    CapacityError,
    ImageTooLarge,
    InvalidImage,
    InvalidMultipart,
    InvalidRange,
    InvalidValue,
    MmgenError,
    TooManyImages,
    UnsupportedParameter,
    UrlNotAllowed,
)
from multimodal_gen.server.form_fields import fields_of
from multimodal_gen.server.multipart import Form, read_form
from multimodal_gen.server.pictures import Pictures
from multimodal_gen.server.ranges import parse_range
from multimodal_gen.server.video_schemas import body_hash, read_video

pytestmark = [pytest.mark.unit]

TYPE = "multipart/form-data; boundary=B"


def part(name: str, data: bytes | str, filename: str | None = None) -> bytes:
    named = "" if filename is None else f'; filename="{filename}"'
    content = data.encode() if isinstance(data, str) else data
    return f'--B\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"


def read(body: bytes, kind: str = TYPE, piece: int = 10**9) -> Form:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), piece):
            yield body[start : start + piece]

    return asyncio.run(read_form(kind, chunks(), 1000))


def form(*parts: bytes, piece: int = 10**9) -> Form:
    return read(b"".join(parts) + b"--B--\r\n", piece=piece)


@pytest.mark.parametrize("piece", [1, 7, 10**9])
def test_a_form_is_read_whatever_its_pieces(piece: int) -> None:
    found = form(
        part("prompt", "ein Käse\r\n-B"), part("n", "2"), part("input_reference", b"\0\xff\r\n", "a"), piece=piece
    )
    assert found.texts == [("prompt", "ein Käse\r\n-B"), ("n", "2")]
    assert found.files == [("input_reference", b"\0\xff\r\n")]


@pytest.mark.parametrize(
    "name", ["../../x.py", "/etc/passwd", "a" * 4096, "C:\\\\x", "a\0b", "ä"], ids=lambda name: name[:10]
)
def test_names_of_files_are_ignored(name: str) -> None:
    assert form(part("input_reference", b"x", name)).files == [("input_reference", b"x")]


BAD_FORMS: dict[str, bytes] = {
    "empty": b"",
    "no end": part("a", "b"),
    "cut off": part("a", "b") + b"--B",
    "another boundary": part("a", "b").replace(b"--B", b"--C") + b"--C--\r\n",
    "garbage": b"hello",
    "no name": b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--\r\n",
    "no disposition": b"--B\r\nContent-Type: text/plain\r\n\r\nx\r\n--B--\r\n",
    "not a form": b'--B\r\nContent-Disposition: attachment; name="a"\r\n\r\nx\r\n--B--\r\n',
    "long name": part("a" * 300, "b") + b"--B--\r\n",
    "long header": part("a", "b", "x" * 20_000) + b"--B--\r\n",
    "many headers": b"--B\r\n" + b"X: y\r\n" * 1000 + b"\r\nx\r\n--B--\r\n",
    "1,001 parts": part("a", "b") * 1001 + b"--B--\r\n",
    "2 MB of text": part("prompt", "x" * 2_000_000) + b"--B--\r\n",
    "not UTF-8": part("prompt", b"\xff\xfe") + b"--B--\r\n",
}


@pytest.mark.parametrize("body", BAD_FORMS.values(), ids=BAD_FORMS.keys())
def test_bad_forms_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidMultipart):
        read(body)


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=", TYPE + "x" * 300])
def test_bad_boundaries_are_refused(kind: str) -> None:
    with pytest.raises(InvalidMultipart):
        read(part("a", "b") + b"--B--\r\n", kind)


def test_a_picture_is_refused_as_soon_as_it_is_too_large() -> None:
    with pytest.raises(ImageTooLarge):
        form(part("input_reference", bytes(1001), "a"), piece=100)


def texts(**fields: str | list[str]) -> Form:
    pairs = [(name, text) for name, given in fields.items() for text in ([given] if isinstance(given, str) else given)]
    return Form(texts=pairs)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"n": "2", "fps": "x", "seed": "-1"}, {"n": 2, "fps": "x", "seed": -1}),
        ({"guidance_scale": "4.5", "flow_shift": "1e1", "seconds": "4"},
         {"guidance_scale": 4.5, "flow_shift": 10.0, "seconds": "4"}),
        ({"guidance_scale": "nan", "n": "1e9", "num_frames": "17.0"},
         {"guidance_scale": "nan", "n": "1e9", "num_frames": "17.0"}),
        ({"seed[]": ["1", "2"]}, {"seed": [1, 2]}),
        ({"prompt": "", "negative_prompt": "", "n": ""}, {"prompt": ""}),
        ({"loras": '[{"nickname": "a", "strength": 0.5}]'}, {"loras": [{"nickname": "a", "strength": 0.5}]}),
        ({"loras": "[]"}, {"loras": []}),
        ({"loras[][nickname]": ["a", "b"], "loras[][strength]": ["1", "0.5"]},
         {"loras": [{"nickname": "a", "strength": 1.0}, {"nickname": "b", "strength": 0.5}]}),
        ({"loras[0][nickname]": "a"}, {"loras": [{"nickname": "a"}]}),
        ({"input_reference[image_url]": "data:x"}, {"input_reference": {"image_url": "data:x"}}),
        ({"strange": "1", "weird[]": "2"}, {"strange": "1", "weird": "2"}),
        ({"enhance_prompt": "true", "n": ""}, {"enhance_prompt": True}),
        ({"enhance_prompt": "yes"}, {"enhance_prompt": "yes"}),
    ],
)  # fmt: skip
def test_text_becomes_what_json_would_have(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert fields_of(texts(**given)) == wanted


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (texts(prompt=["a", "b"]), "prompt"),
        (texts(loras="[{"), "loras"),
        (texts(**{"loras[][nickname]": ["a", "b"], "loras[][strength]": "1"}), "loras"),
        (Form(files=[("prompt", b"x")]), "prompt"),
    ],
)
def test_ambiguous_forms_are_refused(given: Form, param: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        fields_of(given)
    assert caught.value.param == param


def test_many_large_bodies_at_once_are_refused_and_leave_no_trace() -> None:
    pictures = Pictures(100)
    with pictures.room(200 << 20):
        with pytest.raises(CapacityError), pictures.room(100 << 20):
            pass
        with pictures.room(50 << 20):
            pass
    with pictures.room(10 << 30):
        pass


def test_an_empty_file_beside_nothing_is_an_empty_picture() -> None:
    assert fields_of(Form(files=[("input_reference", b"")])) == {"input_reference": [b""]}
    assert fields_of(Form(files=[("input_reference", b""), ("input_reference", b"x")])) == {"input_reference": [b"x"]}


PNG = "data:image/png;base64," + base64.b64encode(b"picture").decode()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(None, None), ([], None), ([b"x"], b"x"), ({"image_url": PNG}, b"picture"), ([{"image_url": PNG}], b"picture"),
     ({"image_url": PNG.replace("image/png", "")}, b"picture"), ({"image_url": "data:base64,"}, UrlNotAllowed)],
)  # fmt: skip
def test_pictures_are_found(value: Any, wanted: Any) -> None:
    if isinstance(wanted, type):
        with pytest.raises(wanted):
            Pictures(100).bytes_of(value)
    else:
        assert Pictures(100).bytes_of(value) == wanted


URLS = [
    "http://127.0.0.1/", "https://example.com/a.png", "http://[::1]/", "http://169.254.169.254/latest", "http://2130706433",
    "http://[::ffff:10.0.0.1]/", "http://127.0.0.1\\@public", "file:///etc/passwd", "gopher://x", "ftp://x", "//x", "",
    "data:image/png,plain", "javascript:alert(1)", " data:image/png;base64,AA",
]  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_nothing_is_fetched(url: str) -> None:
    with pytest.raises(UrlNotAllowed) as caught:
        Pictures(100).bytes_of({"image_url": url})
    assert caught.value.param == "input_reference"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([b"x", b"y"], TooManyImages),
        ([{"image_url": PNG}] * 17, TooManyImages),
        ({"image_url": "data:image/png;base64,@@"}, InvalidImage),
        ({"image_url": "data:image/png;base64,AAA"}, InvalidImage),
        ({"image_url": "data:image/png;base64,ä"}, InvalidImage),
        ({"image_url": "data:image/png;base64," + "A" * 1000}, ImageTooLarge),
        ({"image_url": 5}, InvalidValue),
        ({"image_url": None}, InvalidValue),
        ({"file_id": "file-1"}, UnsupportedParameter),
        ({"url": PNG}, InvalidValue),
        ("picture.png", InvalidValue),
        (7, InvalidValue),
    ],
)
def test_bad_pictures_of_json_are_refused(value: Any, kind: type[MmgenError]) -> None:
    with pytest.raises(kind) as caught:
        Pictures(100).bytes_of(value)
    assert type(caught.value) is kind
    assert caught.value.param == "input_reference"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("bytes=0-0", (0, 1)), ("bytes=0-", (0, 100)), ("bytes=90-500", (90, 100)), ("bytes=-10", (90, 100)),
     ("bytes=-500", (0, 100)), ("bytes=99-", (99, 100)), (" bytes=5-9 ", (5, 10))],
)  # fmt: skip
def test_one_range_is_read(text: str, wanted: tuple[int, int]) -> None:
    assert parse_range(text, 100) == wanted


@pytest.mark.parametrize(
    "text",
    ["bytes=100-", "bytes=-0", "bytes=5-4", "bytes=0-1,3-4", "bytes=" + ",".join(["0-1"] * 10_000), "bytes=", "bytes=-",
     "bytes=a-b", "lines=0-1", "0-1", "bytes=0x1-2", "bytes=1-2-3", "bytes=" + "9" * 100 + "-", "bytes=０-１", ""],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(InvalidRange):
        parse_range(text, 100)


def test_an_empty_file_has_no_range() -> None:
    with pytest.raises(InvalidRange):
        parse_range("bytes=0-", 0)


def test_the_same_request_has_the_same_hash_in_json_and_in_a_form() -> None:
    json, _ = read_video({"prompt": "a", "seconds": 4, "n": 1, "negative_prompt": None}, "error")
    text, _ = read_video(fields_of(texts(prompt="a", seconds="4", n="1")), "error")
    assert body_hash(json, b"x") == body_hash(text, b"x")
    assert body_hash(json, b"x") != body_hash(json, b"y")
    assert body_hash(json, None) != body_hash(json, b"")
    assert body_hash(json, None) != body_hash(json, None, "video_1")
