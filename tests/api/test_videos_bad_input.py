"""Bad requests for videos (the abuse list, items 3, 5, 7, 16 to 28, 45 to 49): the error that names the mistake, and
nothing else happens. The `video_server` fixture checks that the worker is the same and that the next video is made."""

from __future__ import annotations

import base64
import io
import struct
import time
import zlib
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from tests.support.server import Server, assert_error, http
from tests.support.videos import TINY, create, download, post, post_form, wait

pytestmark = [pytest.mark.api]

BIG = 2**63
FRAMES = "num_frames"

INVALID: list[tuple[dict[str, Any], str, str | None]] = [
    *(({"n": n}, "invalid_n", "n") for n in (0, -1, 11, 10**9, 1e9, True, "x", "2", 1.5, [])),
    *(({"size": s}, "invalid_size", "size") for s in ("1x1", "99999x99999", "-8x8", "1024X", "6４x64", "", 64)),
    ({"size": "65x64"}, "invalid_size", "size"),
    ({"size": None, "width": 65}, "invalid_size", "width"),
    ({"width": 64}, "invalid_size", "size"),
    *(({FRAMES: f}, "invalid_value", FRAMES) for f in (BIG, 0, -3, 4, 6, 1027, 1029, "5", 5.0, True)),
    *(({FRAMES: None, "seconds": s}, "invalid_value", "seconds")
      for s in ("1e9", 1e9, "x", "", "-4", -4, 0, "0", True, [4], "٤", " 4", "4 ", "4s", "nan", 3601, "999999", 200)),
    ({"seconds": "4"}, "invalid_value", "seconds"),  # beside num_frames
    ({FRAMES: None, "seconds": 60, "fps": 120}, "invalid_value", "seconds"),
    *(({"fps": f}, "invalid_value", "fps") for f in (0, -1, 121, BIG, "16", 1.5, True)),
    *(({"num_inference_steps": s}, "invalid_value", "num_inference_steps") for s in (10**6, 0, -1, 2.5, True, "4")),
    *(({"guidance_scale": g}, "invalid_value", "guidance_scale") for g in (1e308, -1, "4", True, 10**400)),
    *(({"flow_shift": g}, "invalid_value", "flow_shift") for g in (1e308, -1, 0, "4", True)),
    *(({"seed": s}, "invalid_value", "seed") for s in (BIG, -1, 1.5, "1", True, [1, 2], [True], [], {}, [BIG])),
    ({"seed": list(range(9_000))}, "invalid_value", "seed"),
    *(({"prompt": p}, "invalid_value", "prompt") for p in ("", "   ", None, 5, ["a"])),
    ({"prompt": "x" * 32_001}, "prompt_too_long", "prompt"),
    ({"negative_prompt": "x" * 32_001}, "prompt_too_long", "negative_prompt"),
    ({"negative_prompt": "blue", "guidance_scale": 1.0}, "invalid_value", "negative_prompt"),
    ({"guidance_scale_2": 3.0}, "unsupported_parameter", "guidance_scale_2"),  # the model has one expert
    ({"promt": "a"}, "unknown_parameter", "promt"),
    ({"__class__": "a"}, "unknown_parameter", "__class__"),
    ({"output_format": "avi"}, "invalid_value", "output_format"),
    ({"output_format": "../x"}, "invalid_value", "output_format"),
    ({"priority": 1}, "invalid_value", "priority"),
    ({"user": "u" * 513}, "invalid_value", "user"),
    ({"loras": [{}]}, "invalid_value", "loras[0]"),
    ({"loras": [{"nickname": "x"}]}, "adapter_not_found", "loras"),
    ({"loras": "x"}, "invalid_value", "loras"),
    ({"model": "../x"}, "model_not_found", "model"),
    ({"model": "sora-2"}, "model_not_found", "model"),
    # legal one by one, too much together
    ({"size": "2048x2048", "num_inference_steps": 1000, FRAMES: 1025, "n": 10}, "request_too_large", None),
    ({"size": "2048x2048", "num_inference_steps": 1, FRAMES: 101, "n": 10}, "request_too_large", None),
    ({"input_reference": {"file_id": "file-1"}}, "unsupported_parameter", "input_reference"),
    ({"input_reference": "x.png"}, "invalid_value", "input_reference"),
]  # fmt: skip


def test_invalid_fields_are_named(video_server: Server) -> None:
    made = video_server.metric("mmgen_videos_total")
    for change, code, param in INVALID:
        response = post(video_server, {**TINY, **change})
        status = 404 if code in ("model_not_found", "adapter_not_found") else 400
        assert_error(response, status, code, param)
        assert response.headers["x-should-retry"] == "false"
    assert video_server.metric("mmgen_videos_total") == made


def test_invalid_fields_of_forms_are_named(video_server: Server) -> None:
    tiny = {name: str(value) for name, value in TINY.items()}
    for name, text, code in (
        ("n", "1e9", "invalid_n"),
        ("n", "true", "invalid_n"),
        ("fps", "0", "invalid_value"),
        ("seed", "x", "invalid_value"),
        ("num_frames", "17.0", "invalid_value"),
        ("guidance_scale", "nan", "invalid_value"),
        ("loras", "[", "invalid_value"),
        ("guidance_scale", "Infinity", "invalid_value"),
        ("promt", "x", "unknown_parameter"),
        ("size", "1x1", "invalid_size"),
        ("seed", "9" * 30, "invalid_value"),
        ("prompt", "x" * 32_001, "prompt_too_long"),
        ("prompt", "", "invalid_value"),
    ):
        assert_error(post_form(video_server, {**tiny, name: text}), 400, code, name)


def test_the_nearest_legal_number_of_frames_is_told(video_server: Server) -> None:
    for asked, told in ((4, 5), (6, 5), (7, 9), (16, 17), (1024, 1025)):
        assert f"try {told}" in assert_error(post(video_server, {**TINY, FRAMES: asked}), 400, "invalid_value", FRAMES)


def test_did_you_mean(video_server: Server) -> None:
    message = assert_error(post(video_server, {**TINY, "num_frame": 5}), 400, "unknown_parameter", "num_frame")
    assert "Did you mean 'num_frames'?" in message


def png(width: int = 64, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> dict[str, str]:
    return {"image_url": f"data:{kind};base64," + base64.b64encode(data).decode()}


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def test_a_picture_for_a_model_of_text(video_server: Server) -> None:
    for answer in (
        post(video_server, {**TINY, "input_reference": data_url(png())}),
        post_form(video_server, {"prompt": "x"}, png()),
    ):
        assert "from text alone" in assert_error(answer, 400, "invalid_value", "input_reference")


def test_no_picture_for_a_model_of_pictures(image_video_server: Server) -> None:
    for answer in (post(image_video_server, TINY), post_form(image_video_server, {"prompt": "x"})):
        assert "give one" in assert_error(answer, 400, "invalid_value", "input_reference")


PICTURES: list[tuple[bytes, str]] = [
    (bomb(), "image_too_large"),
    (png()[:-20], "invalid_image"),
    (png().replace(b"IDAT", b"IDAX"), "invalid_image"),
    (b"not a picture", "invalid_image"),
    (b"", "invalid_image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported_image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_image"),
    (b"II*\0" + bytes(100), "unsupported_image"),
    (b"8BPS\0\1" + bytes(100), "unsupported_image"),
    (b"SIMPLE  =                    T", "unsupported_image"),
    (b"\xd7\xcd\xc6\x9a" + bytes(100), "unsupported_image"),
    (b"\x89PNG\r\n\x1a\n" + bytes(2**20), "image_too_large"),  # more bytes than --max-picture-mb
]


def test_bad_pictures_are_refused_whatever_way_they_come(image_video_server: Server) -> None:
    for data, code in PICTURES:
        began = time.monotonic()
        assert_error(post_form(image_video_server, {"prompt": "x"}, data), 400, code, "input_reference")
        assert_error(
            post(image_video_server, {**TINY, "input_reference": data_url(data)}), 400, code, "input_reference"
        )
        assert time.monotonic() - began < 10
    assert wait(image_video_server, create(image_video_server, input_reference=data_url(png()))["id"])["error"] is None


def test_nothing_is_fetched(image_video_server: Server) -> None:
    import socket
    import threading

    touched = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(3)

        def accept() -> None:
            try:
                listener.accept()
            except TimeoutError:
                return
            touched.set()

        waiting = threading.Thread(target=accept)
        waiting.start()
        port = listener.getsockname()[1]
        for url in (
            f"http://127.0.0.1:{port}/a.png",
            f"http://localhost:{port}/",
            f"http://2130706433:{port}/",
            f"http://[::ffff:127.0.0.1]:{port}/",
            f"http://127.0.0.1:{port}\\@example.com/",
            "file:///etc/passwd",
            "gopher://127.0.0.1/",
            "https://example.com/a.png",
            "http://169.254.169.254/",
        ):
            body = {**TINY, "input_reference": {"image_url": url}}
            assert_error(post(image_video_server, body), 400, "url_not_allowed", "input_reference")
        waiting.join()
    assert not touched.is_set()


def test_more_than_one_picture(image_video_server: Server) -> None:
    files = [("prompt", (None, "x"))] + [("input_reference[]", ("a.png", png(), "image/png"))] * 17
    answer = image_video_server.client.post(image_video_server.base_url + "/v1/videos", files=files)
    assert_error(answer, 400, "too_many_images", "input_reference")
    body = {**TINY, "input_reference": [data_url(png())] * 2}
    assert_error(post(image_video_server, body), 400, "too_many_images", "input_reference")


@pytest.mark.parametrize("name", ["../../x.py", "/etc/passwd", "a" * 4096, "x\\..\\y", "%00.png"], ids=lambda n: n[:12])
def test_names_of_files_mean_nothing(image_video_server: Server, name: str) -> None:
    files = {
        **{key: (None, str(value)) for key, value in TINY.items()},
        "input_reference": (name, png(), "text/x-evil"),
    }
    answer = image_video_server.client.post(image_video_server.base_url + "/v1/videos", files=files)
    assert answer.status_code == 200, answer.text
    assert wait(image_video_server, answer.json()["id"])["status"] == "completed"


def test_strange_but_legal_pictures(image_video_server: Server) -> None:
    buffers = []
    for image, kind, options in (
        (Image.new("CMYK", (64, 64)), "JPEG", {}),
        (Image.new("P", (64, 64)), "PNG", {"transparency": 0}),
        (Image.fromarray(np.full((64, 64), 40_000, np.uint16)), "PNG", {}),
        (Image.new("RGB", (1, 1)), "PNG", {}),
        (Image.new("RGB", (3000, 10)), "WEBP", {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        buffers.append(buffer.getvalue())
    for data in buffers:
        answer = post_form(image_video_server, {key: str(value) for key, value in TINY.items()}, data)
        assert answer.status_code == 200, answer.text
        assert wait(image_video_server, answer.json()["id"])["status"] == "completed"


FORMS: dict[str, tuple[str, bytes]] = {
    "no boundary": ("multipart/form-data", b""),
    "another boundary": ("multipart/form-data; boundary=C", b"--B\r\n\r\n"),
    "cut off": ("multipart/form-data; boundary=B", b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx'),
    "1,001 fields": (
        "multipart/form-data; boundary=B",
        b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * 1001 + b"--B--\r\n",
    ),
    "2 MB of text": (
        "multipart/form-data; boundary=B",
        b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"x" * 2_000_000 + b"\r\n--B--\r\n",
    ),
}


@pytest.mark.parametrize(("kind", "body"), FORMS.values(), ids=FORMS.keys())
def test_bad_forms(video_server: Server, kind: str, body: bytes) -> None:
    answer = video_server.client.post(
        video_server.base_url + "/v1/videos", content=body, headers={"content-type": kind}
    )
    assert_error(answer, 400, "invalid_multipart")


def test_bodies_beyond_all_limits_are_not_read(image_video_server: Server) -> None:
    began = time.monotonic()
    answer = image_video_server.exchange(
        http("POST", "/v1/videos", content_type="multipart/form-data; boundary=B", content_length=str(10**9))
    )
    assert_error(answer, 413, "body_too_large")
    url = b'{"prompt": "x", "input_reference": {"image_url": "data:image/png;base64,'
    head = http("POST", "/v1/videos", content_type="application/json", transfer_encoding="chunked")
    chunks = b"%x\r\n%s\r\n" % (len(url), url) + 5 * (b"%x\r\n%s\r\n" % (2**20, b"A" * 2**20))
    assert_error(image_video_server.exchange(head + chunks), 413, "body_too_large")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "x/json"])
def test_other_kinds_of_bodies_are_not_read(video_server: Server, kind: str) -> None:
    answer = post(video_server, TINY, content_type=kind)
    assert_error(answer, 415, "unsupported_media_type")
    form = httpx2.post(
        video_server.base_url + "/v1/videos/x/remix", files={"prompt": (None, "x")}, headers=video_server.headers
    )
    assert_error(form, 415, "unsupported_media_type")


def test_pages_of_other_sites_cannot_send_forms(video_server: Server) -> None:
    body = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--B--\r\n'
    for origin in ("https://evil.example", "null"):
        answer = video_server.exchange(
            http("POST", "/v1/videos", body, content_type="multipart/form-data; boundary=B", origin=origin)
        )
        assert_error(answer, 403, "origin_not_allowed")


def test_queries(video_server: Server) -> None:
    job = wait(video_server, create(video_server)["id"])
    for query, code, param in (
        ("limit=0", "invalid_value", "limit"),
        ("limit=101", "invalid_value", "limit"),
        ("limit=x", "invalid_value", "limit"),
        ("limit=-1", "invalid_value", "limit"),
        ("limit=", "invalid_value", "limit"),
        ("limit=１", "invalid_value", "limit"),
        ("order=up", "invalid_value", "order"),
        ("after=video_x", "invalid_value", "after"),
        ("after=", "invalid_value", "after"),
        ("after=..%2f..%2fetc", "invalid_value", "after"),
        ("page=2", "unknown_parameter", "page"),
    ):
        assert_error(video_server.get("/v1/videos?" + query), 400, code, param)
    for query, code, param in (
        ("variant=audio", "invalid_value", "variant"),
        ("index=1", "invalid_value", "index"),
        ("index=-1", "invalid_value", "index"),
        ("index=x", "invalid_value", "index"),
        ("varient=video", "unknown_parameter", "varient"),
    ):
        assert_error(download(video_server, job["id"], "?" + query), 400, code, param)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/videos/..%2f..%2fetc%2fpasswd/content",
        "/v1/videos/../../etc/passwd",
        "/v1/videos/video_0",
        "/v1/videos/x/content",
        "/v1/videos/%00",
        "/v1/videos/video_0%0d%0aX-Evil:%201",
        "/v1/videos/" + "x" * 5000,
        "/v1/videos/",
        "/v1/videos/'%20OR%201=1--",
        "/v1/videos/edits/x/y",
    ],
    ids=lambda path: path[11:30],
)
def test_ids_that_are_none(video_server: Server, path: str) -> None:
    assert_error(video_server.get(path), 404, "not_found")
    if path.count("/") == 3:
        assert_error(post(video_server, {"prompt": "x"}, path + "/remix"), 404, "not_found")


def test_a_download_before_completion(video_server: Server) -> None:
    job = create(video_server, num_inference_steps=200)
    refused = download(video_server, job["id"])
    assert_error(refused, 409, "video_not_ready")
    assert refused.headers["x-should-retry"] == "false"
    video_server.client.delete(f"{video_server.base_url}/v1/videos/{job['id']}")


def test_bad_remixes(video_server: Server) -> None:
    path = f"/v1/videos/{wait(video_server, create(video_server)['id'])['id']}/remix"
    for body, code, param in (
        ({}, "invalid_value", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": "x", "fps": 0}, "invalid_value", "fps"),
        ({"prompt": "x", "input_reference": {}}, "unknown_parameter", "input_reference"),
        ({"prompt": "x", "num_frames": 4}, "invalid_value", "num_frames"),
    ):
        assert_error(post(video_server, body, path), 400, code, param)
    assert_error(post(video_server, b"{", path), 400, "invalid_json")
