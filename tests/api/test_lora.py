"""Adapters over real HTTP: set, swapped under load, overridden per request, uploaded, refused."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import struct
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch

from multimodal_gen.weights.header import read_header
from multimodal_gen.weights.hub import ASSETS
from tests.support.adapters import low_rank, only, peft_tensors, write_adapter
from tests.support.mmgen import mmgen
from tests.support.server import QUICK, Server, assert_error, http, start_server, wait_for

pytestmark = [pytest.mark.api]

WEIGHTS = ASSETS / "emoji-image" / "transformer" / "diffusion_pytorch_model.safetensors"
SHAPES = {
    name.removesuffix(".weight"): info.shape
    for name, info in read_header(WEIGHTS, "").items()
    if name.startswith("layers.") and len(info.shape) == 2
}


def call(server: Server, path: str, body: object = None, method: str = "POST", **headers: str) -> httpx2.Response:
    return server.client.request(
        method,
        server.base_url + path,
        content=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json", **server.headers, **headers},
    )


def set_lora(server: Server, names: Any, paths: Any = None, **more: Any) -> dict[str, Any]:
    response = call(server, "/v1/set_lora", {"lora_nickname": names, "lora_path": paths, **more})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def listed(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/v1/list_loras").json()
    return found


def picture(server: Server, **body: Any) -> str:
    """The digest of a picture's file without its metadata, which names the adapters."""
    response = server.post({**QUICK, **body})
    assert response.status_code == 200, response.text
    return digest(response.json())


def digest(answer: dict[str, Any]) -> str:
    from io import BytesIO

    from PIL import Image

    image = Image.open(BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    return hashlib.sha256(image.tobytes()).hexdigest()


def write_all(root: Path) -> None:
    """Adapters good and bad."""
    for number, name in enumerate("abc"):
        write_adapter(root / f"{name}.safetensors", peft_tensors(SHAPES, seed=number, size=0.2))
    write_adapter(root / "attention.safetensors", peft_tensors(only(SHAPES, "attention"), rank=2, seed=9))
    other = {"layers.0.attention.to_q": (64, 64)}
    write_adapter(root / "shape.safetensors", peft_tensors(other))
    write_adapter(root / "foreign.safetensors", peft_tensors({"down_blocks.0.attn": (8, 8)}))
    write_adapter(root / "partly.safetensors", peft_tensors({**only(SHAPES, "layers.0."), "nowhere.at.all": (8, 8)}))
    nan = peft_tensors(only(SHAPES, "layers.0."))
    next(iter(nan.values()))[0, 0] = float("nan")
    write_adapter(root / "nan.safetensors", nan)
    big = {"layers.0.attention.to_q": (320, 320)}
    write_adapter(root / "rank.safetensors", peft_tensors(big, rank=2000))
    down, up = low_rank((320, 320), 4, torch.Generator().manual_seed(3))
    loha = {f"hada_w{n}_{x}": (up if x == "a" else down) for n in (1, 2) for x in "ab"}
    write_adapter(
        root / "loha.safetensors", {f"lycoris_layers_0_attention_to_q.{k}": v.clone() for k, v in loha.items()}
    )
    (root / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    (root / "disguised.safetensors").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with zipfile.ZipFile(root / "torch.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    header = {"x.lora_A.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    broken: dict[str, tuple[bytes, bytes]] = {
        "giant": (struct.pack("<Q", 2**63), b""),
        "nojson": (struct.pack("<Q", 4), b"{{{{"),
        "outside": _raw({"x.lora_A.weight": {**header["x.lora_A.weight"], "data_offsets": [0, 1 << 40]}}, 16),
        "overlap": _raw({**header, "y": header["x.lora_A.weight"]}, 16),
        "overflow": _raw({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, 16),
        "cut": _raw(header, 8),
        "empty": _raw({}, 0),
    }
    for name, (head, rest) in broken.items():
        (root / f"{name}.safetensors").write_bytes(head + rest)
    entries = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(150_000)}
    (root / "million.safetensors").write_bytes(b"".join(_raw(entries, 0)))
    (root / "link.safetensors").symlink_to("/etc/hostname")
    (root / "folder_link").symlink_to("/etc")


def _raw(header: dict[str, Any], size: int) -> tuple[bytes, bytes]:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw, bytes(size)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "loras"
    folder.mkdir()
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[Server]:
    flags = ("--lora-root", str(root), "--deterministic", "--max-lora-rank", "512", "--dtype", "float32")
    with start_server(*flags) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """Whatever a test does, the worker lives on and the base model is what it was."""
    before, base = running.worker_pid(), picture(running, loras=[])
    yield running
    assert running.worker_pid() == before
    assert call(running, "/v1/unmerge_lora_weights").status_code == 200
    for info in listed(running)["loaded_adapters"]:
        assert call(running, f"/v1/loras/{info['nickname']}", method="DELETE").status_code == 200
    assert picture(running) == base


def test_set_list_merge_unmerge_unload(server: Server) -> None:
    base = picture(server)
    answer = set_lora(server, ["a", "attention"], ["a.safetensors", "attention.safetensors"], strength=[0.8, -0.5])
    assert answer["status"] == "ok"
    assert answer["message"] == (
        "Successfully set LoRA adapter(s): a (target: all, strength: 0.8), attention (target: all, strength: -0.5)."
    )
    found = listed(server)
    assert {info["nickname"]: (info["path"], info["rank"], info["format"]) for info in found["loaded_adapters"]} == {
        "a": ("a.safetensors", 4, "diffusers: lora"),
        "attention": ("attention.safetensors", 2, "diffusers: lora"),
    }
    assert found["loaded_adapters"][0]["modules"] == {"transformer": len(SHAPES)}
    assert found["loaded_adapters"][0]["bytes"] > 100_000
    (active,) = found["active"]["transformer"]
    assert active["nickname"] == "a,attention"
    assert (active["strengths"], active["merged"], active["mode"]) == ([0.8, -0.5], True, "merge")
    both = picture(server)
    assert both != base
    assert not set_lora(server, ["a", "attention"], None, strength=[0.8, -0.5])["changed"]
    reverse = set_lora(server, ["attention", "a"], strength=[-0.5, 0.8])
    assert [a["nicknames"] for a in reverse["active"]["transformer"]] == [["attention", "a"]]
    assert_error(call(server, "/v1/loras/a", method="DELETE"), 409, "adapter_in_use")
    assert call(server, "/v1/unmerge_lora_weights", {"target": "transformer"}).json()["active"] == {}
    assert picture(server) == base
    assert "Nothing to do" in call(server, "/v1/unmerge_lora_weights").json()["message"]
    assert call(server, "/v1/merge_lora_weights", {"strength": 2.0}).json()["active"]["transformer"][0][
        "strengths"
    ] == [
        -1.0,
        1.6,
    ]
    set_lora(server, [])
    assert picture(server) == base
    assert call(server, "/v1/loras/a", method="DELETE").status_code == 200
    assert [info["nickname"] for info in listed(server)["loaded_adapters"]] == ["attention"]
    assert_error(call(server, "/v1/loras/a", method="DELETE"), 404, "adapter_not_found")
    assert server.metric("mmgen_lora_loaded") == 1


def test_merged_and_beside_are_the_same_picture_within_rounding(server: Server) -> None:
    made = {}
    for mode in ("merge", "dynamic"):
        set_lora(server, "a", "a.safetensors", merge_mode=mode)
        response = server.post(QUICK).json()
        assert response["loras"] == [{"nickname": "a", "strength": 1.0, "target": "transformer"}]
        made[mode] = base64.b64decode(response["data"][0]["b64_json"])
        assert listed(server)["active"]["transformer"][0]["mode"] == mode
    from io import BytesIO

    import numpy as np
    from PIL import Image

    merged, beside = (np.asarray(Image.open(BytesIO(data))).astype(int) for data in made.values())
    assert np.abs(merged - beside).max() <= 1
    assert merged.std() > 5


def test_a_new_path_for_a_known_name_reloads_and_a_changed_file_too(server: Server, root: Path) -> None:
    first = set_lora(server, "x", "a.safetensors")["loaded_adapters"][0]["digest"]
    assert not set_lora(server, "x", "a.safetensors")["changed"]
    assert set_lora(server, "x", "b.safetensors")["loaded_adapters"][0]["digest"] != first
    moving = root / "moving.safetensors"
    write_adapter(moving, peft_tensors(SHAPES, seed=50))
    one = set_lora(server, "x", "moving.safetensors")["loaded_adapters"][0]["digest"]
    write_adapter(moving, peft_tensors(SHAPES, seed=51, rank=5))
    assert set_lora(server, "x", "moving.safetensors")["loaded_adapters"][0]["digest"] != one


def test_requests_have_their_own_lists(server: Server) -> None:
    base = picture(server)
    set_lora(server, "a", "a.safetensors")
    active = picture(server)
    set_lora(server, "b", "b.safetensors", merge_mode="merge")
    other = picture(server)
    assert len({base, active, other}) == 3
    assert picture(server, loras=[]) == base
    own = picture(server, loras=[{"nickname": "b"}])  # beside the weights, whatever is active: same request, same bits
    set_lora(server, "a")
    assert picture(server, loras=[{"nickname": "b"}]) == own
    set_lora(server, "b", merge_mode="merge")
    client = openai.OpenAI(base_url=server.base_url + "/v1", api_key="none", max_retries=0)
    made = client.images.generate(
        prompt=str(QUICK["prompt"]),
        size="64x64",
        extra_body={"num_inference_steps": 2, "seed": 1, "loras": [{"nickname": "a", "strength": 0.5}]},
    )
    assert made.data
    assert made.model_extra is not None
    assert made.model_extra["loras"] == [{"nickname": "a", "strength": 0.5, "target": "transformer"}]
    assert picture(server) == other


def test_text_encoder_and_all_targets_are_named_right(server: Server) -> None:
    assert_error(
        call(server, "/v1/set_lora", {"lora_nickname": "a", "lora_path": "a.safetensors", "target": "text_encoder"}),
        400,
        "adapter_mismatch",
        "lora_nickname",
    )
    message = assert_error(
        call(server, "/v1/set_lora", {"lora_nickname": "a", "lora_path": "a.safetensors", "target": "transformer_2"}),
        400,
        "invalid_value",
        "target",
    )
    assert "text_encoder" in message


def upload(server: Server, data: bytes, query: str, **headers: str) -> httpx2.Response:
    return server.client.post(
        f"{server.base_url}/v1/loras?{query}",
        content=data,
        headers={"content-type": "application/octet-stream", **server.headers, **headers},
    )


def test_uploads(server: Server, root: Path) -> None:
    data = (root / "c.safetensors").read_bytes()
    response = upload(server, data, "nickname=sent")
    assert response.status_code == 200, response.text
    assert response.json()["bytes_received"] == len(data)
    (file,) = (root / "uploads").glob("*.safetensors")
    assert file.read_bytes() == data
    assert picture(server, loras=[{"nickname": "sent"}]) != picture(server)
    for broken, code in ((data[:-5], "corrupt_adapter"), (b"", "corrupt_adapter"), (pickle.dumps(1), "unsafe_format")):
        assert_error(upload(server, broken, "nickname=broken"), 400, code)
    odd = json.dumps({"\ud800x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    strange = struct.pack("<Q", len(odd)) + odd + bytes(4)
    assert_error(upload(server, strange, "nickname=odd&allow_partial=true"), 400, "corrupt_adapter")
    assert_error(upload(server, data, "nickname=../x"), 400, "invalid_value", "nickname")
    assert_error(upload(server, data, ""), 400, "invalid_value", "nickname")
    assert_error(upload(server, data, "nickname=y&strenght=1"), 400, "unknown_parameter", "strenght")
    assert_error(upload(server, data, "nickname=y", **{"content-type": "text/plain"}), 415, "unsupported_media_type")
    assert list((root / "uploads").iterdir()) == [file]
    assert call(server, "/v1/loras/sent", method="DELETE").status_code == 200
    assert not file.exists()


def test_uploads_at_once_under_one_name_leave_no_file_behind(server: Server, root: Path) -> None:
    data = [(root / f"{name}.safetensors").read_bytes() for name in "abc"]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: upload(server, data[i % 3], "nickname=par").status_code, range(12)))
    assert answers == [200] * 12
    assert len(list((root / "uploads").iterdir())) == 1
    assert call(server, "/v1/loras/par", method="DELETE").status_code == 200
    assert list((root / "uploads").iterdir()) == []


def test_an_upload_that_does_not_come_is_given_up(root: Path) -> None:
    """Abuse item 14: time is given for bytes that come, not for the size that is announced."""
    with start_server("--lora-root", str(root), "--body-timeout-s", "1") as server:
        started = time.monotonic()
        head = http("POST", "/v1/loras?nickname=slow", content_type="application/octet-stream", content_length="100")
        assert_error(server.exchange(head + b"x", timeout_s=20), 408, "request_timeout")
        assert time.monotonic() - started < 10
        assert list((root / "uploads").iterdir()) == []


def test_a_file_of_the_server_replays_byte_for_byte(server: Server, root: Path, tmp_path: Path) -> None:
    """Alpha and partial loading are part of the recipe, and so are the server's threads."""
    set_lora(
        server,
        ["part", "b"],
        ["partly.safetensors", "b.safetensors"],
        strength=[0.5, 0.7],
        lora_alpha=[None, 6.0],
        allow_partial=True,
    )
    data = base64.b64decode(server.post(QUICK).json()["data"][0]["b64_json"])
    (tmp_path / "made.png").write_bytes(data)
    where = [f"part={root / 'partly.safetensors'}", f"b={root / 'b.safetensors'}"]
    done = mmgen(
        "generate", "--replay", "made.png", "--lora", where[0], "--lora", where[1], "-o", "again.png", folder=tmp_path
    )
    assert done.code == 0, done
    assert "pixels may differ" not in done.err
    assert (tmp_path / "again.png").read_bytes() == data


SET = "/v1/set_lora"
BAD: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    # 29: paths
    *(
        (f"path {path!r}", {"lora_nickname": "x", "lora_path": path}, 403, "path_not_allowed", "lora_path")
        for path in (
            "/etc/hostname",
            "/etc",
            "../x",
            "../../etc/passwd",
            "\\\\host\\x",
            "https://host/x",
            "file:///x",
            "~/x",
        )
    ),
    ("link out", {"lora_nickname": "x", "lora_path": "link.safetensors"}, 403, "path_not_allowed", "lora_path"),
    ("link folder", {"lora_nickname": "x", "lora_path": "folder_link/hostname"}, 403, "path_not_allowed", "lora_path"),
    ("missing", {"lora_nickname": "x", "lora_path": "none.safetensors"}, 404, "adapter_not_found", "lora_path"),
    ("long", {"lora_nickname": "x", "lora_path": "a" * 300}, 404, "adapter_not_found", "lora_path"),
    (
        "alpha of 400 digits",
        {"lora_nickname": "x", "lora_path": "a", "lora_alpha": 10**400},
        400,
        "invalid_value",
        "lora_alpha",
    ),
    ("NUL", {"lora_nickname": "x", "lora_path": "a\0b"}, 400, "invalid_value", "lora_path"),
    # 30: pickles
    *(
        (name, {"lora_nickname": "x", "lora_path": name}, 400, "unsafe_format", None)
        for name in ("pickle.pt", "disguised.safetensors", "torch.safetensors")
    ),
    # 31: headers
    *(
        (name, {"lora_nickname": "x", "lora_path": f"{name}.safetensors"}, 400, "corrupt_adapter", None)
        for name in ("giant", "nojson", "outside", "overlap", "overflow", "cut", "empty", "million", "nan")
    ),
    # 32: shapes, ranks, strengths
    ("shape", {"lora_nickname": "x", "lora_path": "shape.safetensors"}, 400, "adapter_mismatch", None),
    ("foreign", {"lora_nickname": "x", "lora_path": "foreign.safetensors"}, 400, "adapter_mismatch", None),
    ("partly", {"lora_nickname": "x", "lora_path": "partly.safetensors"}, 400, "adapter_mismatch", None),
    ("rank", {"lora_nickname": "x", "lora_path": "rank.safetensors"}, 400, "invalid_adapter", None),
    (
        "strength",
        {"lora_nickname": "a", "lora_path": "a.safetensors", "strength": 1e30},
        400,
        "invalid_value",
        "strength",
    ),
    (
        "strength word",
        {"lora_nickname": "a", "lora_path": "a.safetensors", "strength": "1"},
        400,
        "invalid_value",
        "strength",
    ),
    (
        "alpha",
        {"lora_nickname": "a", "lora_path": "a.safetensors", "lora_alpha": 0},
        400,
        "invalid_value",
        "lora_alpha",
    ),
    ("alpha alone", {"lora_nickname": "a", "lora_alpha": 2}, 400, "invalid_value", "lora_alpha"),
    (
        "loha beside",
        {"lora_nickname": "a", "lora_path": "loha.safetensors", "merge_mode": "dynamic"},
        400,
        "adapter_merge_only",
        "merge_mode",
    ),
    # the call itself
    ("no name", {}, 400, "invalid_value", "lora_nickname"),
    ("not loaded", {"lora_nickname": "nobody"}, 404, "adapter_not_found", "lora_nickname"),
    ("lengths", {"lora_nickname": ["a", "b"], "lora_path": ["a.safetensors"]}, 400, "invalid_value", "lora_path"),
    ("lengths of strengths", {"lora_nickname": ["a", "b"], "strength": [1, 2, 3]}, 400, "invalid_value", "strength"),
    (
        "target",
        {"lora_nickname": "a", "lora_path": "a.safetensors", "target": "critic"},
        400,
        "invalid_value",
        "target",
    ),
    (
        "mode",
        {"lora_nickname": "a", "lora_path": "a.safetensors", "merge_mode": "fuse"},
        400,
        "invalid_value",
        "merge_mode",
    ),
    ("name", {"lora_nickname": "../a", "lora_path": "a.safetensors"}, 400, "invalid_value", "lora_nickname"),
    ("unknown field", {"lora_nickname": "a", "lora_paht": "a.safetensors"}, 400, "unknown_parameter", "lora_paht"),
    ("many", {"lora_nickname": ["a"] * 33}, 400, "invalid_value", "lora_nickname"),
    (
        "second bad",
        {"lora_nickname": ["a", "x"], "lora_path": ["a.safetensors", "nan.safetensors"]},
        400,
        "corrupt_adapter",
        None,
    ),
]


@pytest.mark.parametrize(("body", "status", "code", "param"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_changes_leave_everything_as_it_was(
    server: Server, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    set_lora(server, "kept", "b.safetensors", strength=0.7)
    before, made = listed(server), picture(server)
    message = assert_error(call(server, SET, body), status, code, param)
    assert "/etc" not in message or "/etc" in json.dumps(body)
    assert listed(server) == before
    assert picture(server) == made


def test_lengths_are_both_named(server: Server) -> None:
    body = {"lora_nickname": ["a", "b"], "lora_path": ["a.safetensors", "b.safetensors", "c.safetensors"]}
    message = assert_error(call(server, SET, body), 400, "invalid_value", "lora_path")
    assert "3 values for 2 adapters" in message


def test_the_rest_of_a_partly_fitting_file_can_be_asked_for(server: Server) -> None:
    answer = set_lora(server, "x", "partly.safetensors", allow_partial=True)
    assert answer["loaded_adapters"][0]["skipped"] == ["transformer.nowhere.at.all"]


@pytest.mark.parametrize(
    ("loras", "code", "param"),
    [
        ([{"nickname": "nobody"}], "adapter_not_found", "loras"),
        ([{"nickname": "a", "strenght": 1}], "unknown_parameter", "loras[0]"),
        ([{"nickname": "a", "strength": 1e9}], "invalid_value", "loras[0].strength"),
        ([{"strength": 1}], "invalid_value", "loras[0]"),
        ([{"nickname": "a", "target": "vae"}], "invalid_value", "loras[0].target"),
        ([{"nickname": "a"}] * 33, "invalid_value", "loras"),
        ("a", "invalid_value", "loras"),
        ([{"nickname": "loha"}], "adapter_merge_only", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_lists_of_requests(server: Server, loras: Any, code: str, param: str | None) -> None:
    set_lora(server, ["a", "loha"], ["a.safetensors", "loha.safetensors"])
    assert_error(server.post({**QUICK, "loras": loras}), 404 if code == "adapter_not_found" else 400, code, param)


def test_a_server_without_a_language_model_has_no_adapters_of_one(server: Server) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert_error(call(server, path, {"lora_name": "a"}), 400, "unsupported_endpoint")


def test_only_the_admin_changes_adapters(root: Path) -> None:
    """Abuse item 34."""
    with start_server("--lora-root", str(root), "--admin-api-key", "boss", api_key="user") as server:
        change = {"lora_nickname": "a", "lora_path": "a.safetensors"}
        for method, path, body in (
            ("POST", SET, change),
            ("POST", "/v1/merge_lora_weights", {}),
            ("POST", "/v1/unmerge_lora_weights", {}),
            ("DELETE", "/v1/loras/a", None),
        ):
            assert_error(call(server, path, body, method), 403, "admin_key_required")
            assert_error(call(server, path, body, method, authorization="Bearer no"), 401, "invalid_api_key")
        assert_error(upload(server, b"x", "nickname=x"), 403, "admin_key_required")
        assert call(server, SET, change, authorization="Bearer boss").status_code == 200
        assert listed(server)["active"]
        assert server.post(QUICK).status_code == 200
        assert call(server, "/v1/models", None, "GET", authorization="Bearer boss").status_code == 200


def test_limits_and_adapters_from_the_start(root: Path) -> None:
    """Abuse item 35; `--lora` with strength and target."""
    flags = ("--lora-root", str(root), "--max-loras", "2", "--max-lora-mb", "2")
    with start_server(*flags, "--lora", f"first={root}/a.safetensors:0.5:transformer") as server:
        assert listed(server)["active"]["transformer"][0]["strengths"] == [0.5]
        set_lora(server, "b", "b.safetensors")
        assert_error(call(server, SET, {"lora_nickname": "c", "lora_path": "c.safetensors"}), 429, "adapter_limit")
        assert call(server, "/v1/loras/first", method="DELETE").status_code == 200
        write_adapter(root / "large.safetensors", peft_tensors(SHAPES, rank=64))
        message = assert_error(
            call(server, SET, {"lora_nickname": "c", "lora_path": "large.safetensors"}), 429, "adapter_limit"
        )
        assert "--max-lora-mb" in message
        assert call(server, SET, {"lora_nickname": "c", "lora_path": "c.safetensors"}).status_code == 200


@pytest.mark.parametrize("fault", ["adapter:raise:1", "merge:raise:1", "merge:oom:1", "merge:kill:1", "adapter:kill:1"])
def test_a_change_that_fails_half_way_leaves_the_set_before(root: Path, fault: str) -> None:
    """`merge` fails after the first weight has been written."""
    with start_server("--lora-root", str(root), "--deterministic", fault=fault) as server:
        base, pid = picture(server), server.worker_pid()
        # The fault strikes the first change; what it leaves is the base model, and then the next change works.
        response = call(server, SET, {"lora_nickname": "a", "lora_path": "a.safetensors", "merge_mode": "merge"})
        assert response.status_code in (500, 503), response.text
        assert response.headers["x-should-retry"] == "false"
        if "kill" in fault:
            assert_error(response, 500, "worker_crashed")
            wait_for(lambda: server.get("/health/ready").status_code == 200, 60, "the next worker")
        else:
            assert server.worker_pid() == pid
        assert listed(server) == {"loaded_adapters": [], "active": {}}
        assert picture(server) == base
        set_lora(server, "a", "a.safetensors", merge_mode="merge")
        assert picture(server) != base
        assert picture(server, loras=[]) == base


def test_the_next_worker_has_the_adapters_of_the_one_before(root: Path) -> None:
    import os
    import signal

    with start_server("--lora-root", str(root), "--deterministic") as server:
        set_lora(server, ["a", "b"], ["a.safetensors", "b.safetensors"], strength=[0.5, 1.0])
        before, made = listed(server), picture(server)
        os.kill(server.worker_pid(), signal.SIGKILL)
        wait_for(lambda: server.get("/health/ready").status_code == 503, 10, "the death to be seen")
        assert_error(call(server, SET, {"lora_nickname": "a"}), 503, "model_loading")
        assert picture(server) == made
        assert listed(server) == before


@pytest.mark.slow
def test_sixty_swaps_while_eight_clients_paint(root: Path) -> None:
    """Every picture is exactly one set's, bit for bit, and of the set that its answer names."""
    paths = {name: f"{name}.safetensors" for name in "abc"}
    sets: list[tuple[tuple[str, ...], tuple[float, ...], str]] = [
        (("a",), (1.0,), "merge"),
        (("a", "b"), (0.5, 0.8), "merge"),
        (("b", "a"), (0.8, 0.5), "dynamic"),
        ((), (), "auto"),
        (("c", "a", "b"), (0.3, -0.2, 0.6), "dynamic"),
        (("c",), (0.9,), "merge"),
    ]
    body = {**QUICK, "num_inference_steps": 3, "guidance_scale": 2.0}
    with start_server("--lora-root", str(root), "--deterministic") as server:
        set_lora(server, list(paths), list(paths.values()))
        known: dict[str, str] = {}  # set as an answer names it → picture
        for names, strengths, mode in sets:
            set_lora(server, list(names), strength=list(strengths) or 1.0, merge_mode=mode)
            answer = server.post(body).json()
            known[json.dumps(answer.get("loras"))] = digest(answer)
        assert len(set(known.values())) == len(sets)
        swapping, seen = True, set[str]()

        def paint() -> int:
            done = 0
            with httpx2.Client(timeout=120.0) as client:
                while swapping:
                    response = client.post(server.base_url + "/v1/images/generations", json=body)
                    assert response.status_code == 200, response.text
                    answer = response.json()
                    name = json.dumps(answer.get("loras"))
                    assert digest(answer) == known[name], name
                    seen.add(name)
                    done += 1
            return done

        with ThreadPoolExecutor(8) as pool:
            painters = [pool.submit(paint) for _ in range(8)]
            try:
                for number in range(60):
                    names, strengths, mode = sets[number % len(sets)]
                    answer = set_lora(server, list(names), strength=list(strengths) or 1.0, merge_mode=mode)
                    assert answer["changed"], number
            finally:
                swapping = False
            painted = sum(painter.result(60) for painter in painters)
        assert painted >= 16
        assert len(seen) >= 3, seen
        assert server.metric("mmgen_worker_restarts_total") == 0
