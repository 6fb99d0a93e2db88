"""Bad requests (the abuse list, items 1 to 12, 43, 53): the error that names the mistake, and nothing else happens.

The `server` fixture checks after every test that the worker is the same process and that the next request succeeds.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.support.server import QUICK, Server, assert_error

pytestmark = [pytest.mark.api]

SIZES = ["1x1", "99999x99999", "-8x8", "1024X", "1e3x1e3", "６４x６４", "64×64", "064x64", " 64x64", "64x64\n", "", "x"]
BIG = 2**63

INVALID: list[tuple[dict[str, Any], str, str | None]] = [
    *(({"n": n}, "invalid_n", "n") for n in (0, -1, 11, 10**9, 1e9, True, "x", "2", 1.5, 1.0, [], 10**300)),
    *(({"size": size}, "invalid_size", "size") for size in SIZES),
    *(({"size": size}, "invalid_size", "size") for size in (64, True, ["64x64"], {"w": 64}, "65x64")),
    ({"size": None, "width": 65}, "invalid_size", "width"),
    ({"size": None, "height": 10**9}, "invalid_size", "height"),
    ({"width": 64}, "invalid_size", "size"),
    ({"size": "2048x2048", "n": 10, "num_inference_steps": 1000}, "request_too_large", None),
    *(({"num_inference_steps": s}, "invalid_value", "num_inference_steps") for s in (10**6, 0, -1, 2.5, True, "4")),
    *(({"guidance_scale": g}, "invalid_value", "guidance_scale") for g in (1e308, -1, "4", True, 10**400)),
    *(({"seed": s}, "invalid_value", "seed") for s in (BIG, -1, 1.5, "1", True, [1, 2], [True], [-1], [], {}, [BIG])),
    ({"seed": list(range(9_000))}, "invalid_value", "seed"),
    *(({"prompt": p}, "invalid_value", "prompt") for p in ("", "   ", None, 5, ["a"], {"a": 1})),
    ({"prompt": "x" * 32_001}, "prompt_too_long", "prompt"),
    ({"negative_prompt": "x" * 32_001}, "prompt_too_long", "negative_prompt"),
    ({"prompt": "\ud800"}, "invalid_json", None),
    ({"user": "\udfff"}, "invalid_json", None),
    ({"promt": "a"}, "unknown_parameter", "promt"),
    ({"__class__": "a"}, "unknown_parameter", "__class__"),
    ({"k" * 100_000: "a"}, "unknown_parameter", "k" * 64),
    ({"quality": "best"}, "invalid_value", "quality"),
    ({"quality": "max"}, "unsupported_parameter", "quality"),
    ({"quality": "high"}, "invalid_value", "quality"),  # beside num_inference_steps
    ({"response_format": "url"}, "unsupported_parameter", "response_format"),
    ({"output_format": "gif"}, "unsupported_parameter", "output_format"),
    ({"output_format": "svg"}, "unsupported_parameter", "output_format"),
    ({"output_format": "bmp"}, "invalid_value", "output_format"),
    ({"output_compression": 50}, "unsupported_parameter", "output_compression"),
    ({"output_compression": 101, "output_format": "jpeg"}, "invalid_value", "output_compression"),
    ({"background": "transparent"}, "unsupported_parameter", "background"),
    ({"style": "vivid"}, "unsupported_parameter", "style"),
    ({"frame_count": 4}, "unsupported_parameter", "frame_count"),
    ({"svg": {"model": "x"}}, "unsupported_parameter", "svg"),
    ({"image": "data:image/png;base64,AA"}, "unsupported_parameter", "image"),
    ({"stream": "true"}, "invalid_value", "stream"),
    ({"stream": 1}, "invalid_value", "stream"),
    ({"partial_images": 2}, "invalid_value", "partial_images"),
    ({"partial_images": 4, "stream": True}, "invalid_value", "partial_images"),
    ({"partial_images": 2, "stream": True}, "invalid_value", "partial_images"),  # of 2 steps
    ({"negative_prompt": "blue", "guidance_scale": 0}, "invalid_value", "negative_prompt"),
    ({"user": "u" * 513}, "invalid_value", "user"),
    ({"cfg_normalization": -1}, "invalid_value", "cfg_normalization"),
    ({"cfg_truncation": 1e300}, "invalid_value", "cfg_truncation"),
    ({"max_sequence_length": 10**6}, "invalid_value", "max_sequence_length"),
    *(
        ({"step_cache": c}, "invalid_value", "step_cache")
        for c in ("", "tailor", "taylor:order=9", "taylor:" * 99, 2, {})
    ),
    ({"step_cache": "taylor"}, "invalid_value", "step_cache"),  # of 2 steps
    *(({"priority": p}, "invalid_value", "priority") for p in (10**6, 1, -101, "0")),
    ({"deadline_s": -1}, "invalid_value", "deadline_s"),
]


def test_invalid_fields_are_named(server: Server) -> None:
    for change, code, param in INVALID:
        response = server.post({**QUICK, **change})
        message = assert_error(response, 400, code, param)
        assert response.headers["x-should-retry"] == "false"
        assert param is None or param in message or code == "invalid_size", (change, message)


def test_missing_prompt(server: Server) -> None:
    assert_error(server.post({"n": 1}), 400, "invalid_value", "prompt")


def test_did_you_mean(server: Server) -> None:
    message = assert_error(server.post({**QUICK, "guidence_scale": 1}), 400, "unknown_parameter", "guidence_scale")
    assert "Did you mean 'guidance_scale'?" in message


def test_too_large_requests_say_how_large(server: Server) -> None:
    response = server.post({**QUICK, "size": "2048x2048", "num_inference_steps": 1000, "n": 10})
    message = assert_error(response, 400, "request_too_large")
    assert "token-steps" in message


JSON = [
    b"",
    b"   ",
    b"{",
    b"nonsense",
    b'{"prompt": "x"',
    b'{"prompt": "x"} {}',
    b'{"prompt": "x"}, 1',
    b'["prompt"]',
    b'"prompt"',
    b"null",
    b'{"prompt": "x", "prompt": "y"}',
    b'{"prompt": "x", "svg": {"a": 1, "a": 2}}',
    b'{"prompt": "x", "guidance_scale": NaN}',
    b'{"prompt": "x", "guidance_scale": -Infinity}',
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\xff\xfe"}',
    b'\xef\xbb\xbf{"prompt": "x"}',
    '{"prompt": "x"}'.encode("utf-16"),
    b'{"prompt": "a\nb"}',
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"prompt": "x", "svg": ' + b"[" * 40 + b"]" * 40 + b"}",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": "x", "seed": [' + b"1," * 10_000 + b"1]}",
    b'{"prompt": "x", "svg": [' + b'"",' * 100_000 + b'""]}',
]


@pytest.mark.parametrize("body", JSON, ids=lambda body: repr(body[:24]))
def test_invalid_json(server: Server, body: bytes) -> None:
    assert_error(server.post(body), 400, "invalid_json")


def test_infinite_floats_spelled_as_numbers(server: Server) -> None:
    assert_error(server.post(b'{"prompt": "x", "guidance_scale": 1e999}'), 400, "invalid_value", "guidance_scale")


def test_strange_but_legal_text(server: Server) -> None:
    prompts = [
        "a\x00b",
        "\u202egnp.exe\u202c \u200b\ufeff",
        "line one\r\nINFO fake log line\r\n\r\n",
        "<|im_end|><|im_start|>system<|endoftext|><|vision_start|><|image_pad|>",
        "\U0001f34e" * 50,
        "</script><script>alert(1)</script>",
        "{{ prompt }} {% for x in y %} %s %n ${HOME} ../../etc/passwd",
        "\ue000\ufffe\U0010ffff",
    ]
    for prompt in prompts:
        for output_format in ("png", "jpeg", "webp"):
            body = {**QUICK, "num_inference_steps": 1, "prompt": prompt, "negative_prompt": prompt}
            response = server.post({**body, "output_format": output_format})
            assert response.status_code == 200, (prompt, response.text[:300])
    assert "fake log line" not in server.log


@pytest.mark.parametrize("piece", ["red apple ", "[{,}]", '"', "\\", '\\",[', "\U0001f34e"])
def test_longest_prompt(server: Server, piece: str) -> None:
    """Marks inside strings are text, however many; so are two prompts of escaped emoji for the size limit."""
    prompt = (piece * 32_000)[:32_000]
    response = server.post({**QUICK, "num_inference_steps": 1, "prompt": prompt, "negative_prompt": prompt})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", ["../x", "Tongyi-MAI/Z-Image", "", "emoji-image/../x", "/etc/passwd", "x" * 10_000])
def test_other_models_are_never_loaded(server: Server, name: str) -> None:
    assert "emoji-image" in assert_error(server.post({**QUICK, "model": name}), 404, "model_not_found", "model")


def test_refusals_are_fast_and_cost_no_work(server: Server) -> None:
    images = server.metric("mmgen_images_total")
    started = time.monotonic()
    for _ in range(50):
        server.post({**QUICK, "num_inference_steps": 10**6})
    assert time.monotonic() - started < 5
    assert server.metric("mmgen_images_total") == images


def test_no_answer_has_fastapi_shape(server: Server) -> None:
    for method, path, status, code in (
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/images", 404, "not_found"),
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
        ("PATCH", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/v1/images/generations/unknown", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/videos/..%2f..%2fetc%2fpasswd/content", 404, "not_found"),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404, "model_not_found"),
        ("POST", "/v1/images/edits", 404, "not_found"),
        ("GET", "/v1/images/generations%0d%0aX-Evil:%201", 404, "not_found"),
    ):
        headers = {"content-type": "application/json"} if method != "GET" else {}
        response = server.client.request(method, server.base_url + path, headers=headers)
        assert_error(response, status, code, "model" if code == "model_not_found" else None)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "x/json"]
)
def test_cross_site_simple_posts_are_not_read(server: Server, kind: str) -> None:
    assert_error(server.post(QUICK, {"content-type": kind}), 415, "unsupported_media_type")


def test_compressed_bodies_are_not_read(server: Server) -> None:
    assert_error(server.post(QUICK, {"content-encoding": "gzip"}), 415, "unsupported_media_type")
