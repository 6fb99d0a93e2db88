"""`POST /v1/sleep` and `/v1/wake` over real HTTP: the memory is gone, and the same pictures come back."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from multimodal_gen.weights.hub import ASSETS
from tests.support.checkpoints import make_stable_diffusion
from tests.support.server import QUICK, ROOT, Server, assert_error, start_server, wait_for
from tests.support.sleeping import order, resident, sleep, wake
from tests.support.survival import contents, flags_for
from tests.support.videos import TINY, get, post

pytestmark = [pytest.mark.api]

WEIGHTS = sum(file.stat().st_size for file in (ASSETS / "emoji-image").rglob("*.safetensors"))
LONG = {**QUICK, "num_inference_steps": 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundled model, whose files may be moved."""
    return shutil.copytree(ASSETS / "emoji-image", tmp_path_factory.mktemp("models") / "emoji-image")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Server]:
    flags = ("--model-path", str(folder), "--lora-root", str(ROOT / "examples" / "loras"), "--dtype", "float32")
    with start_server(*flags) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """Whatever a test does, it ends awake, without adapters, and the same picture is made as before."""
    before = picture(running)
    yield running
    wake(running)
    lora(running, [])
    assert picture(running) == before


def picture(server: Server, **more: Any) -> bytes:
    response = server.post({**QUICK, **more})
    assert response.status_code == 200, response.text[:500]
    return base64.b64decode(response.json()["data"][0]["b64_json"])


def lora(server: Server, names: list[str], **more: Any) -> None:
    body = {"lora_nickname": names, "lora_path": [f"{name}.safetensors" for name in names], **more}
    response = order(server, "set_lora", body)
    assert response.status_code == 200, response.text


def model(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/v1/models").json()["data"][0]["memory"]
    return found


def test_the_memory_is_gone_and_the_same_picture_comes_back(server: Server) -> None:
    before, held = picture(server), resident(server)
    assert model(server)["device_bytes"] >= WEIGHTS
    answer = sleep(server)
    assert answer["status"] == "asleep"
    assert answer["freed_bytes"] >= WEIGHTS
    assert held - resident(server) > 0.9 * WEIGHTS
    assert model(server)["asleep"]
    assert model(server)["device_bytes"] == 0
    assert server.metric("mmgen_asleep") == 1
    assert server.metric("mmgen_ready") == 0
    assert server.metric('mmgen_weights_bytes{tier="device"}') == 0
    assert server.metric("mmgen_condition_cache_bytes") == 0
    moved = server.metric("mmgen_weights_moved_bytes_total")
    answer = wake(server)
    assert answer["status"] == "ready"
    assert answer["device_bytes"] == model(server)["device_bytes"] >= WEIGHTS
    assert server.metric("mmgen_weights_moved_bytes_total") - moved >= WEIGHTS
    assert server.metric("mmgen_asleep") == 0
    assert picture(server) == before


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
def test_adapters_are_there_after_waking(server: Server, mode: str) -> None:
    base = picture(server)
    lora(server, ["pixel-art", "blueprint"], strength=[0.8, 0.5], merge_mode=mode)
    before, listed = picture(server), server.get("/v1/list_loras").json()
    assert before != base
    sleep(server)
    assert server.get("/v1/list_loras").json() == listed
    wake(server)
    assert picture(server) == before
    assert server.get("/v1/list_loras").json() == listed
    lora(server, [])
    assert picture(server) == base


def test_whoever_asks_a_sleeping_server_is_told_how_to_wake_it(server: Server) -> None:
    sleep(server)
    refused = server.post(QUICK)
    assert "POST /v1/wake" in assert_error(refused, 503, "asleep")
    assert refused.headers["x-should-retry"] == "false"
    assert_error(order(server, "set_lora", {"lora_nickname": []}), 503, "asleep")
    for path in ("/health", "/health/ready"):
        health = server.get(path)
        assert (health.status_code, health.json()["status"]) == (503, "asleep")
    assert server.get("/health/live").status_code == 200
    assert server.metric('mmgen_rejected_total{reason="asleep"}') >= 1


def test_both_may_be_said_twice_and_take_no_fields(server: Server) -> None:
    assert wake(server)["device_bytes"] == model(server)["device_bytes"]
    assert_error(order(server, "sleep", {"level": 1}), 400, "unknown_parameter", "level")
    assert picture(server)
    assert sleep(server)["freed_bytes"] > 0
    assert sleep(server)["freed_bytes"] == 0
    wake(server)
    wake(server)


def test_requests_that_were_admitted_are_finished_first(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        before = server.metric("mmgen_images_total")
        admitted = [pool.submit(server.post, LONG) for _ in range(2)]
        wait_for(lambda: server.metric("mmgen_queue_cost") > 0 and server.metric("mmgen_running") == 2, 20, "the start")
        going = pool.submit(sleep, server)
        wait_for(lambda: server.get("/health").json()["status"] == "asleep", 5, "the refusal of others")
        assert_error(server.post(QUICK), 503, "asleep")
        assert not going.done()
        assert server.metric("mmgen_images_total") == before
        assert going.result(60)["freed_bytes"] >= WEIGHTS
        assert [answer.result(1).status_code for answer in admitted] == [200, 200]


def test_a_wake_in_the_middle_of_falling_asleep_has_the_last_word(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        admitted = pool.submit(server.post, LONG)
        wait_for(lambda: server.metric("mmgen_running") == 1, 20, "the start")
        going = pool.submit(sleep, server)
        wait_for(lambda: server.get("/health").json()["status"] == "asleep", 5, "the refusal of others")
        assert wake(server)["status"] == "ready"
        assert going.result(1)["freed_bytes"] >= WEIGHTS
        assert admitted.result(1).status_code == 200
        assert picture(server)


def test_where_a_file_is_gone_it_sleeps_on_and_wakes_once_it_is_back(server: Server, folder: Path) -> None:
    lora(server, ["pixel-art"], merge_mode="merge")
    before, pid = picture(server), server.worker_pid()
    sleep(server)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    away = file.rename(folder / "elsewhere")
    for _ in range(2):
        message = assert_error(order(server, "wake"), 503, "weights_unavailable")
        assert file.name in message
        assert_error(server.post(QUICK), 503, "asleep")
        assert model(server)["device_bytes"] == 0
    away.rename(file)
    wake(server)
    assert picture(server) == before
    assert server.worker_pid() == pid


def test_a_worker_that_dies_in_its_sleep_is_started_when_it_is_woken(server: Server, folder: Path) -> None:
    lora(server, ["pixel-art"], merge_mode="merge")
    before = picture(server)
    sleep(server)
    moved = server.metric("mmgen_weights_moved_bytes_total")
    os.kill(server.worker_pid(), signal.SIGKILL)
    wait_for(lambda: server.metric("mmgen_worker_restarts_total") >= 1, 10, "its death")
    assert server.worker_pids() == []
    assert server.get("/health").json()["status"] == "asleep"
    assert sleep(server)["freed_bytes"] == 0
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    away = file.rename(folder / "elsewhere")
    assert file.name in assert_error(order(server, "wake"), 503, "weights_unavailable")
    wait_for(lambda: server.worker_pids() == [], 10, "the end of the worker that could not load")
    away.rename(file)
    assert wake(server)["device_bytes"] >= WEIGHTS
    assert picture(server) == before
    assert server.metric("mmgen_weights_moved_bytes_total") >= moved + WEIGHTS, "a counter never goes back"


def test_a_caller_who_leaves_does_not_stop_it(server: Server) -> None:
    body = b"{}"
    head = "POST /v1/sleep HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n"
    with ThreadPoolExecutor(1) as pool:
        admitted = pool.submit(server.post, LONG)
        wait_for(lambda: server.metric("mmgen_running") == 1, 20, "the start")
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + body)
            wait_for(lambda: server.get("/health").json()["status"] == "asleep", 5, "the refusal of others")
        assert admitted.result(60).status_code == 200
    wait_for(lambda: server.metric('mmgen_weights_bytes{tier="device"}') == 0, 10, "the sleep")


def test_only_the_admin_may(folder: Path) -> None:
    with start_server("--model-path", str(folder), "--admin-api-key", "root", api_key="user") as server:
        for what in ("sleep", "wake"):
            assert_error(order(server, what), 403, "admin_key_required")
            assert_error(order(server, what, headers={"authorization": "Bearer wrong"}), 401, "invalid_api_key")
        admin = {"authorization": "Bearer root"}
        assert order(server, "sleep", headers=admin).status_code == 200
        assert order(server, "wake", headers=admin).status_code == 200
        assert picture(server)


def test_a_server_that_sleeps_stops_like_any_other(folder: Path) -> None:
    with start_server("--model-path", str(folder)) as server:
        sleep(server)
        server.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_a_server_that_is_falling_asleep_answers_and_stops(folder: Path) -> None:
    with start_server("--model-path", str(folder)) as server, ThreadPoolExecutor(2) as pool:
        admitted = pool.submit(server.post, LONG)
        wait_for(lambda: server.metric("mmgen_running") == 1, 20, "the start")
        going = pool.submit(order, server, "sleep")
        wait_for(lambda: server.get("/health").json()["status"] == "asleep", 5, "the refusal of others")
        server.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert admitted.result(1).status_code == 200
        assert going.result(1).status_code in (200, 503)


@pytest.mark.parametrize("flag", ["--dp-size", "--ring-degree"], ids=["replicas", "ranks"])
def test_all_replicas_and_ranks_give_back_what_they_hold(folder: Path, flag: str) -> None:
    with start_server("--model-path", str(folder), flag, "2", "--threads", "1", "--dtype", "float32") as server:
        before, held = picture(server), resident(server)
        assert len(server.worker_pids()) == 2
        freed = sleep(server)["freed_bytes"]
        assert freed >= 2 * WEIGHTS
        assert held - resident(server) > 0.9 * freed
        wake(server)
        assert picture(server) == before


def test_videos_wait_and_go_on(t2v_folder: Path, tmp_path: Path) -> None:
    long = {**TINY, "num_inference_steps": 16, "num_frames": 9}
    with start_server(*flags_for(t2v_folder, tmp_path), fault="denoise:slow:8") as server:
        first, second = (post(server, {**long, "seed": seed}).json()["id"] for seed in (1, 2))
        wait_for(lambda: get(server, first)["progress"] >= 20, 60, "some steps")
        sleep(server)
        assert [get(server, video)["status"] for video in (first, second)] == ["queued", "queued"]
        assert 0 < get(server, first)["progress"] < 100
        assert_error(post(server, TINY), 503, "asleep")
        wake(server)
        woken = contents(server, [first, second])
        again = contents(server, [post(server, {**long, "seed": seed}).json()["id"] for seed in (1, 2)])
        assert woken == again, "they are not what they would have been"
        assert server.metric("mmgen_jobs_resumed_total") >= 1


def test_what_diffusers_holds_goes_with_its_worker(tmp_path: Path) -> None:
    with start_server("--model-path", str(make_stable_diffusion(tmp_path / "sd")), "--dtype", "float32") as server:
        before = picture(server)
        assert model(server)["components"] is None
        assert sleep(server)["freed_bytes"] == 0
        assert server.worker_pids() == []
        assert_error(server.post(QUICK), 503, "asleep")
        wake(server)
        assert picture(server) == before
        assert server.metric("mmgen_worker_restarts_total") == 0, "nothing has died"


def test_operators_see_where_streamed_weights_are(folder: Path) -> None:
    with start_server("--model-path", str(folder), "--offload", "layerwise", "--dtype", "float32") as server:
        before, seen = picture(server), model(server)
        assert seen["components"]["transformer"]["residency"] == "streamed"
        assert seen["components"]["transformer"]["resident_layers"] is not None
        assert seen["slots"] >= 2
        assert 0 < seen["slots"] * seen["slot_bytes"] < seen["device_bytes"] < WEIGHTS
        assert seen["tiers"]["file"] > 0
        assert seen["tiers"]["device"] == seen["device_bytes"]
        assert server.metric('mmgen_weights_bytes{tier="file"}') == seen["tiers"]["file"]
        assert server.metric("mmgen_weights_stall_seconds_total") > 0
        assert server.metric("mmgen_last_step_stall_seconds") >= 0
        picture(server)
        assert (
            model(server)["moved_bytes"] - seen["moved_bytes"] > 2 * QUICK["num_inference_steps"] * seen["slot_bytes"]
        )
        assert server.metric("mmgen_weights_loads_total") > 0
        sleep(server)
        assert model(server)["device_bytes"] == 0
        wake(server)
        assert picture(server) == before
