"""`mmgen serve` with two ranks and with two replicas, over HTTP."""

from __future__ import annotations

import base64
import io
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from multimodal_gen.generator import DiffGenerator
from tests.support.checkpoints import PROMPT, make_z_image
from tests.support.server import Server, assert_error, run_server, start_server, wait_for
from tests.support.survival import contents, flags_for
from tests.support.videos import TINY, get, post

pytestmark = [pytest.mark.api, pytest.mark.slow]

BODY = {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 3, "seed": 1}
LONG = {**BODY, "num_inference_steps": 900}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_z_image(tmp_path_factory.mktemp("model") / "z")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    flags = ("--num-gpus", "2", "--tp-size", "2", "--dtype", "float32", "--threads", "1")
    with start_server("--model-path", str(folder), *flags) as started:
        yield started


def pixels(server: Server, body: dict[str, object]) -> np.ndarray:
    response = server.post(body)
    assert response.status_code == 200, response.text[:500]
    with Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"]))) as image:
        return np.asarray(image).astype(int)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_two_ranks_answer_like_one_worker(server: Server, folder: Path) -> None:
    assert len(server.worker_pids()) == 2
    with DiffGenerator.from_pretrained(str(folder), dtype="float32", threads=1) as generator:
        want = generator.generate(PROMPT, width=64, height=64, num_inference_steps=3, seed=1, output_type="np")
    assert np.abs(pixels(server, BODY) - want.images[0]).max() <= 1


def test_a_request_is_cancelled_over_http(server: Server) -> None:
    before = server.worker_pids()
    with ThreadPoolExecutor(1) as pool:
        doomed = pool.submit(server.post, LONG, {"x-request-id": "doomed"})
        wait_for(lambda: server.metric("mmgen_running") == 1, 20, "the start")
        assert server.delete("doomed").status_code == 200
        assert_error(doomed.result(10), 499, "cancelled")
    assert server.post(BODY).status_code == 200
    assert server.worker_pids() == before


def test_a_rank_that_is_killed_takes_its_request_down_and_no_other(server: Server) -> None:
    before = server.worker_pids()
    with ThreadPoolExecutor(1) as pool:
        doomed = pool.submit(server.post, LONG)
        wait_for(lambda: server.metric("mmgen_running") == 1, 20, "the start")
        os.kill(before[1], signal.SIGKILL)
        assert_error(doomed.result(10), 500, "worker_crashed")
    assert server.post(BODY).status_code == 200
    assert server.metric("mmgen_worker_restarts_total") == 1
    assert all(gone(pid) for pid in before)
    assert len(server.worker_pids()) == 2


def test_no_rank_outlives_a_killed_front(folder: Path) -> None:
    with start_server("--model-path", str(folder), "--tp-size", "2") as server:
        before = server.worker_pids()
        assert len(before) == 2
        server.process.kill()
        wait_for(lambda: all(gone(pid) for pid in before), 5, "their end")


def test_two_replicas_share_requests_out_and_one_is_enough(folder: Path) -> None:
    flags = ("--dp-size", "2", "--threads", "1", "--max-batch-tokens", "100")
    with start_server("--model-path", str(folder), *flags) as server, ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(server.post, LONG) for _ in range(2))
        wait_for(lambda: server.metric("mmgen_running") == 2, 20, "both to run")
        for number in range(2):
            assert server.metric(f'mmgen_replica_ready{{replica="{number}"}}') == 1
            assert server.metric(f'mmgen_replica_cost{{replica="{number}"}}') > 0
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        answers = [first.result(60).status_code, second.result(60).status_code]
        assert sorted(answers) == [200, 500]
        assert server.get("/health/ready").status_code == 200
        assert server.post(BODY).status_code == 200
        wait_for(lambda: server.metric('mmgen_replica_ready{replica="0"}') == 1, 60, "the restart")


def test_a_rank_that_dies_costs_a_video_nothing_but_time(t2v_folder: Path, tmp_path: Path) -> None:
    job = {**TINY, "num_inference_steps": 20, "num_frames": 9}
    flags = flags_for(t2v_folder, tmp_path, "--tp-size", "2")
    with start_server(*flags, fault="denoise:slow:1000") as server:
        video = post(server, job).json()["id"]
        wait_for(lambda: get(server, video)["progress"] >= 40, 60, "some steps")
        os.kill(server.worker_pids()[1], signal.SIGKILL)
        resumed = contents(server, [video])
        assert server.metric("mmgen_jobs_resumed_total") == 1
        assert resumed == contents(server, [post(server, job).json()["id"]]), "it is not what it would have been"


def test_what_cannot_be_shared_out_is_refused_before_loading(folder: Path) -> None:
    done = run_server("--model-path", str(folder), "--tp-size", "3")
    assert done.returncode == 2
    assert "4 attention heads" in done.stderr
    assert "3" in done.stderr
    assert "Traceback" not in done.stderr
