"""Adapters of the language model over real HTTP: loaded, named by requests, evicted, sent as tensors, refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from safetensors.torch import load_file, save

from tests.support.adapters import low_rank, write_adapter
from tests.support.server import Server, assert_error, start_server, wait_for
from tests.support.text_core import make_text_folder

pytestmark = [pytest.mark.api]

WIDTH, LAYERS = 96, 3
PROMPT = "grinning face"
ADMIN = "the-admin-key"


def write(path: Path, seed: int, size: float = 3.0) -> Path:
    """An adapter that makes the tiny model say something else."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        down, up = low_rank((WIDTH, WIDTH), 4, generator, size)
        tensors[f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_A.weight"] = down
        tensors[f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_B.weight"] = up
    return write_adapter(path, tensors)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("a", "b", "c", "d")):
        write(folder / f"{name}.safetensors", seed)
    (folder / "pickled.safetensors").write_bytes(pickle.dumps({"x": 1}))
    write(folder.parent / "outside.safetensors", 9)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder("llama", tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def server(root: Path, model: Path) -> Iterator[Server]:
    flags = ("--model-path", "none", "--llm-path", str(model), "--llm-dtype", "float32", "--lora-root", str(root))
    with start_server(*flags, "--max-loaded-loras", "2", "--lora-paths", f"a={root / 'a.safetensors'}") as running:
        yield running


def call(server: Server, path: str, body: object, **headers: str) -> httpx2.Response:
    return server.client.post(
        server.base_url + path,
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json", **server.headers, **headers},
    )


def load(server: Server, name: str, path: str | None = None, **more: Any) -> dict[str, Any]:
    body = {"lora_name": name, "lora_path": path or f"{name}.safetensors", **more}
    response = call(server, "/v1/load_lora_adapter", body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def complete(server: Server, **body: Any) -> httpx2.Response:
    settings = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return call(server, "/v1/completions", {**settings, **body})


def said(server: Server, **body: Any) -> str:
    response = complete(server, **body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def loaded(server: Server) -> list[str]:
    data = server.get("/v1/models").json()["data"]
    return [view["id"].partition(":")[2] for view in data if ":" in view["id"]]


def metrics(server: Server) -> dict[str, float]:
    lines = server.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_requests_name_an_adapter_in_the_model_or_in_lora_path(server: Server):
    base, a = said(server), said(server, model="tiny:a")
    assert base != a
    assert said(server, lora_path="a") == a
    assert said(server, model="tiny", lora_path="a") == a
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none")
    answer = client.completions.create(
        model="tiny:a", prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert (answer.choices[0].text, answer.model) == (a, "tiny:a")
    assert "tiny:a" in [each.id for each in client.models.list()]
    assert client.models.retrieve("tiny:a").id == "tiny:a"
    assert_error(complete(server, model="tiny:nobody"), 404, "adapter_not_found", "model")
    assert_error(complete(server, lora_path="nobody"), 404, "adapter_not_found", "lora_path")
    assert_error(complete(server, model="tiny:a", lora_path="a"), 400, "invalid_value", "lora_path")
    assert_error(complete(server, lora_path=7), 400, "invalid_value", "lora_path")


def test_loading_one_more_makes_the_least_recently_used_leave(server: Server):
    load(server, "a")
    load(server, "b")
    said(server, model="tiny:a")
    before = metrics(server)
    done = load(server, "c")
    assert done["evicted"] == ["b"]
    assert done["success"]
    assert done["loaded_adapters"] == {"a": "a.safetensors", "c": "c.safetensors"}
    assert loaded(server) == ["a", "c"]
    after = metrics(server)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    size = done["adapters"][-1]["bytes"]
    assert grown['mmgen_lora_tensor_load_bytes_total{origin="path"}'] == size
    assert grown['mmgen_lora_load_latency_ms_count{origin="path"}'] == 1
    assert after['mmgen_lora_load_latency_ms_sum{origin="path"}'] > 0
    assert (after["mmgen_text_lora_loaded"], after["mmgen_text_lora_used"]) == (2, 0)
    assert grown["mmgen_text_lora_evicted_total"] == 1


def test_the_same_again_changes_nothing_and_pins_are_kept(server: Server):
    load(server, "a", pinned=True)
    load(server, "b", pinned=True)
    assert not load(server, "b", pinned=True)["changed"]
    response = call(server, "/v1/load_lora_adapter", {"lora_name": "c", "lora_path": "c.safetensors"})
    assert_error(response, 429, "adapter_limit")
    load(server, "a", pinned=False)
    assert load(server, "c")["evicted"] == ["a"]
    load(server, "b", pinned=False)


def test_a_path_in_a_request_is_loaded_for_it(server: Server):
    direct = load(server, "d")
    wanted = said(server, model="tiny:d")
    assert call(server, "/v1/unload_lora_adapter", {"lora_name": "d"}).json()["success"]
    assert said(server, lora_path="d.safetensors") == wanted
    (name,) = [name for name in loaded(server) if name.startswith("d@")]
    assert said(server, lora_path="d.safetensors") == wanted
    assert said(server, lora_path=name) == wanted
    assert direct["adapters"][-1]["digest"]
    assert_error(complete(server, lora_path="../outside.safetensors"), 403, "path_not_allowed", "lora_path")
    assert_error(complete(server, lora_path="missing.safetensors"), 404, "adapter_not_found", "lora_path")


def send_tensors(server: Server, data: bytes, **fields: str) -> httpx2.Response:
    form = {"sha256": hashlib.sha256(data).hexdigest(), **fields}
    return server.client.post(
        server.base_url + "/v1/load_lora_adapter_from_tensors",
        data=form,
        files={"tensors": ("../../x.py", data)},
        headers=server.headers,
    )


def test_tensors_are_loaded_with_their_configuration_and_leave_no_file_behind(server: Server, root: Path):
    tensors = load_file(root / "c.safetensors")
    load(server, "c")
    wanted = said(server, model="tiny:c")
    doubled = {key: value * (0.25 if "lora_B" in key else 1.0) for key, value in tensors.items()}
    data = save(doubled)
    response = send_tensors(server, data, lora_name="sent", config=json.dumps({"lora_alpha": 16, "r": 4}))
    assert response.status_code == 200, response.text
    assert response.json()["bytes_received"] == len(data)
    assert said(server, model="tiny:sent") == wanted, "alpha / rank is 4"
    assert len(list((root / "uploads").rglob("*.safetensors"))) == 1
    assert call(server, "/v1/unload_lora_adapter", {"lora_name": "sent"}).status_code == 200
    assert list((root / "uploads").iterdir()) == []
    assert metrics(server)['mmgen_lora_load_latency_ms_count{origin="tensors"}'] >= 1


def test_tensors_that_are_not_what_they_should_be_are_refused(server: Server, root: Path):
    data = (root / "c.safetensors").read_bytes()
    before = loaded(server)
    wrong = "0" * 64
    assert_error(send_tensors(server, data, lora_name="x", sha256=wrong), 400, "corrupt_adapter", "sha256")
    assert_error(send_tensors(server, data, lora_name="x", sha256="short"), 400, "invalid_value", "sha256")
    assert_error(send_tensors(server, data, lora_name="../x"), 400, "invalid_value", "lora_name")
    assert_error(send_tensors(server, data), 400, "invalid_value", "lora_name")
    assert_error(send_tensors(server, data, lora_name="x", config="[1"), 400, "invalid_json")
    assert_error(send_tensors(server, data, lora_name="x", pickled="true"), 400, "unknown_parameter", "pickled")
    assert_error(send_tensors(server, pickle.dumps({"x": 1}), lora_name="x"), 400, "unsafe_format")
    assert_error(send_tensors(server, data[:-5], lora_name="x"), 400, "corrupt_adapter")
    assert_error(send_tensors(server, b"", lora_name="x"), 400, "corrupt_adapter")
    response = server.client.post(
        server.base_url + "/v1/load_lora_adapter_from_tensors", data={"lora_name": "x"}, files={"other": ("f", data)}
    )
    assert_error(response, 400, "invalid_multipart")
    assert_error(call(server, "/v1/load_lora_adapter_from_tensors", {}), 415, "unsupported_media_type")
    assert loaded(server) == before
    assert list((root / "uploads").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "status", "code", "param"),
    [
        ("/etc", 403, "path_not_allowed", "lora_path"),
        ("../outside.safetensors", 403, "path_not_allowed", "lora_path"),
        ("http://127.0.0.1/x", 403, "path_not_allowed", "lora_path"),
        ("missing.safetensors", 404, "adapter_not_found", "lora_path"),
        ("pickled.safetensors", 400, "unsafe_format", None),
        (7, 400, "invalid_value", "lora_path"),
        (None, 400, "invalid_value", "lora_path"),
    ],
)
def test_paths_that_must_not_be_loaded_are_not(server: Server, path: object, status: int, code: str, param: str | None):
    before = loaded(server)
    assert_error(call(server, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path}), status, code, param)
    assert loaded(server) == before


def test_unloading_waits_for_the_answers_that_use_it(server: Server):
    load(server, "a")
    wanted, answers = said(server, model="tiny:a", max_tokens=200), list[str]()
    thread = threading.Thread(target=lambda: answers.append(said(server, model="tiny:a", max_tokens=200)))
    thread.start()
    wait_for(lambda: metrics(server)["mmgen_text_lora_used"] == 1 or bool(answers), 10, "the answer begins")
    began = time.monotonic()
    response = call(server, "/v1/unload_lora_adapter", {"lora_name": "a"})
    assert response.status_code == 200, response.text
    thread.join()
    assert answers == [wanted]
    assert time.monotonic() - began < 20
    assert "a" not in loaded(server)
    assert_error(complete(server, model="tiny:a"), 404, "adapter_not_found", "model")
    assert_error(call(server, "/v1/unload_lora_adapter", {"lora_name": "a"}), 404, "adapter_not_found", "lora_name")


def test_a_worker_that_dies_comes_back_with_its_adapters(root: Path, model: Path):
    flags = ("--model-path", "none", "--llm-path", str(model), "--llm-dtype", "float32", "--lora-root", str(root))
    (root / "e.safetensors").write_bytes((root / "d.safetensors").read_bytes())
    with start_server(*flags, "--dp-size", "2", "--max-loras-per-batch", "1") as server:
        load(server, "a", pinned=True)
        load(server, "e")
        wanted, wanted_e = said(server, model="tiny:a"), said(server, model="tiny:e")
        (root / "e.safetensors").unlink()
        for pid in server.worker_pids():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: server.get("/health/ready").status_code == 200, 60, "the workers are back")
        assert said(server, model="tiny:a") == wanted
        assert wanted_e
        assert_error(complete(server, model="tiny:e"), 503, "adapter_unavailable")
        assert loaded(server) == ["a", "e"]


def test_what_changes_adapters_for_everybody_needs_the_admin_key_and_a_failed_change_changes_nothing(
    root: Path, model: Path
):
    flags = ("--model-path", "none", "--llm-path", str(model), "--llm-dtype", "float32", "--lora-root", str(root))
    flags = (*flags, "--tp-size", "2")  # one rank's failure is the other's
    admin = {"authorization": f"Bearer {ADMIN}"}
    fault = "adapter:raise:1@1"
    with start_server(*flags, "--admin-api-key", ADMIN, api_key="a-user-key", fault=fault) as server:
        for path in ("load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter"):
            assert_error(call(server, f"/v1/{path}", {}), 403, "admin_key_required")
        assert_error(complete(server, lora_path="a.safetensors"), 403, "admin_key_required", "lora_path")
        body = {"lora_name": "a", "lora_path": "a.safetensors"}
        assert_error(call(server, "/v1/load_lora_adapter", body, **admin), 500, "generation_failed")
        assert loaded(server) == []
        response = call(server, "/v1/load_lora_adapter", body, **admin)
        assert response.status_code == 200, response.text
        assert said(server, model="tiny:a") != said(server)
        assert call(server, "/v1/sleep", {}, **admin).status_code == 200
        assert_error(call(server, "/v1/load_lora_adapter", {**body, "lora_name": "b"}, **admin), 503, "asleep")
        assert call(server, "/v1/wake", {}, **admin).status_code == 200
        assert said(server, model="tiny:a") != said(server)
