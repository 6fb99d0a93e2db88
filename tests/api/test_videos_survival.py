"""Accepted videos are made, bit for bit as if nothing had happened, whatever is killed and whenever."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.adapters import make_adapter_for
from tests.support.server import Server, assert_error, run_server, start_server, wait_for
from tests.support.survival import JOBS, contents, disturbed, flags_for, kill_all, undisturbed
from tests.support.videos import TINY, create, delete, download, get, listed, post, wait

pytestmark = [pytest.mark.api]

LONG: dict[str, Any] = {**TINY, "num_inference_steps": 14, "n": 2, "num_frames": 9}


@pytest.fixture(scope="module")
def reference(t2v_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The files of `LONG`, undisturbed."""
    return undisturbed(t2v_folder, tmp_path_factory.mktemp("jobs"), [LONG])[0]


def half_way(server: Server, video_id: str) -> None:
    wait_for(lambda: get(server, video_id)["progress"] >= 50, 60, "half of the steps")


def test_a_running_video_goes_on_from_its_checkpoint_after_kill_9(
    t2v_folder: Path, tmp_path: Path, reference: list[bytes]
) -> None:
    flags = flags_for(t2v_folder, tmp_path)
    with start_server(*flags, fault="denoise:slow:1000") as server:
        video, waiting = post(server, LONG).json()["id"], post(server, {**TINY, "priority": -1}).json()["id"]
        half_way(server, video)
        kill_all(server)
    rows = sorted(path.name for path in tmp_path.glob(f"*/videos/{video}/row-*.safetensors"))
    assert len(rows) == 4, "the last two of each row"
    with start_server(*flags) as server:
        assert get(server, video)["progress"] >= 29, "it does not begin anew"
        assert contents(server, [video]) == [reference]
        assert server.metric("mmgen_jobs_resumed_total") >= 1
        assert wait(server, waiting)["status"] == "completed"
        assert not list(tmp_path.glob("*/videos/*/row-*")), "checkpoints go when the job has ended"


def test_a_worker_that_dies_alone_costs_nothing_but_time(
    t2v_folder: Path, tmp_path: Path, reference: list[bytes]
) -> None:
    with start_server(*flags_for(t2v_folder, tmp_path), fault="denoise:slow:1000") as server:
        video = post(server, LONG).json()["id"]
        half_way(server, video)
        os.kill(server.worker_pid(), signal.SIGKILL)
        assert contents(server, [video]) == [reference]
        assert server.metric("mmgen_jobs_resumed_total") == 1
        assert server.metric("mmgen_worker_restarts_total") == 1


def test_a_video_that_kills_two_workers_is_not_tried_again(t2v_folder: Path, tmp_path: Path) -> None:
    with start_server(*flags_for(t2v_folder, tmp_path), fault="denoise:kill:1") as server:
        video = post(server, {**LONG, "num_inference_steps": 1000}).json()["id"]
        wait_for(lambda: server.metric("mmgen_worker_restarts_total") == 1, 60, "the first death")
        wait_for(lambda: server.metric("mmgen_ready") == 1, 60, "the next worker")
        wait_for(lambda: get(server, video)["progress"] > 0, 60, "a step")
        os.kill(server.worker_pid(), signal.SIGKILL)
        job = wait(server, video)
        assert (job["status"], job["error"]["code"]) == ("failed", "worker_crashed")
        wait_for(lambda: server.metric("mmgen_ready") == 1, 60, "the next worker")
        assert wait(server, create(server)["id"])["status"] == "completed"


def test_sigterm_puts_running_videos_back(t2v_folder: Path, tmp_path: Path, reference: list[bytes]) -> None:
    flags = flags_for(t2v_folder, tmp_path)
    with start_server(*flags, fault="denoise:slow:1000") as server:
        video, waiting = post(server, LONG).json()["id"], post(server, {**TINY, "priority": -1}).json()["id"]
        half_way(server, video)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 10, "it ends with the next checkpoint, not with the video"
    with start_server(*flags) as server:
        assert contents(server, [video]) == [reference]
        assert server.metric("mmgen_jobs_resumed_total") == 1
        assert wait(server, waiting)["status"] == "completed"


@pytest.mark.slow
def test_random_moments(t2v_folder: Path, tmp_path: Path) -> None:
    """Two moments and four jobs; benchmarks/survival.py takes twenty and ten."""
    jobs = JOBS[:4]
    wanted = undisturbed(t2v_folder, tmp_path / "calm", jobs)
    files, seen = disturbed(t2v_folder, tmp_path / "wild", jobs, kills=2, seed=1, longest_s=2.0)
    assert files == wanted
    assert seen["kills"] == 2


def test_what_was_acknowledged_in_the_moment_of_the_kill_is_there_and_the_rest_can_be_sent_again(
    t2v_folder: Path, tmp_path: Path
) -> None:
    flags = flags_for(t2v_folder, tmp_path)
    acknowledged: dict[str, str] = {}
    sent: set[str] = set()

    def send(server: Server, sender: int) -> None:
        for number in itertools.count():
            key = f"{sender}-{number}"
            sent.add(key)
            try:
                answer = httpx2.post(
                    server.base_url + "/v1/videos", json={**TINY, "seed": number}, headers={"idempotency-key": key}
                )
            except httpx2.TransportError:
                return
            assert answer.status_code == 200, answer.text
            acknowledged[key] = answer.json()["id"]

    with start_server(*flags) as server:
        with ThreadPoolExecutor(4) as pool:
            senders = [pool.submit(send, server, sender) for sender in range(4)]
            time.sleep(0.7)
            kill_all(server)
        for sender in senders:
            sender.result()
    assert len(sent) > len(acknowledged) > 4
    with start_server(*flags) as server:
        for video_id in acknowledged.values():
            get(server, video_id)
        for key in sent:
            seed = int(key.partition("-")[2])
            answer = post(server, {**TINY, "seed": seed}, idempotency_key=key).json()
            assert answer["id"] == acknowledged.get(key, answer["id"])
            acknowledged[key] = answer["id"]
        ids = listed(server)
        assert len(ids) == len(set(ids)) == len(sent), "no job is lost and none is there twice"
        assert set(ids) == set(acknowledged.values())


def test_a_video_whose_adapter_is_gone_fails_and_says_so(t2v_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "loras"
    adapter = make_adapter_for(t2v_folder, root / "a.safetensors")
    flags = flags_for(t2v_folder, tmp_path / "data", "--lora-root", str(root))
    with start_server(*flags, fault="denoise:slow:1000") as server:
        post(server, {"lora_nickname": "a", "lora_path": "a.safetensors"}, "/v1/set_lora").raise_for_status()
        first, second = post(server, LONG).json()["id"], post(server, LONG).json()["id"]
        half_way(server, first)
        kill_all(server)
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    with start_server(*flags) as server:
        for video in (first, second):
            job = wait(server, video)
            assert job["status"] == "failed"
            assert job["error"]["code"] in ("adapter_not_found", "adapter_unavailable"), job["error"]
            assert "adapter of this request" in job["error"]["message"]
        assert wait(server, create(server)["id"])["status"] == "completed"
    flags = flags_for(t2v_folder, tmp_path / "copy", "--lora", f"a={adapter}", "--lora-root", str(root))
    with start_server(*flags) as server:
        one, two = contents(server, [first, second])
        assert one == two, "the one from a checkpoint and the one from the start"


def test_files_that_cannot_be_written_fail_the_job_and_nothing_else(t2v_folder: Path, tmp_path: Path) -> None:
    with start_server(*flags_for(t2v_folder, tmp_path), fault="decode:slow:1") as server:
        video = create(server)["id"]
        (folder,) = (wait_for_folder(tmp_path, video),)
        shutil.rmtree(folder)
        job = wait(server, video)
        assert (job["status"], job["error"]["code"]) == ("failed", "storage_full")
        assert str(tmp_path) not in job["error"]["message"]
        assert wait(server, create(server)["id"])["status"] == "completed"


def wait_for_folder(data: Path, video_id: str) -> Path:
    wait_for(lambda: bool(list(data.glob(f"*/videos/{video_id}"))), 30, "the job's folder")
    return next(data.glob(f"*/videos/{video_id}"))


def test_two_servers_do_not_share_a_folder(t2v_folder: Path, tmp_path: Path) -> None:
    flags = ("--model-path", str(t2v_folder), "--data-dir", str(tmp_path))
    with start_server(*flags, ready=False):
        refused = run_server(*flags, "--port", "0", "--device", "cpu")
        assert refused.returncode == 2
        assert "Another server keeps its jobs" in refused.stderr
        assert "--data-dir" in refused.stderr


def test_an_acknowledged_video_can_be_downloaded_from_the_next_server_too(t2v_folder: Path, tmp_path: Path) -> None:
    flags = ("--model-path", str(t2v_folder), "--data-dir", str(tmp_path))
    with start_server(*flags) as server:
        video = wait(server, create(server)["id"])["id"]
        data = download(server, video).content
    with start_server(*flags, ready=False) as server:
        assert download(server, video).content == data, "while the model still loads"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a file system needs rights that are not there")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_refuses_new_videos_and_fails_running_ones(t2v_folder: Path, small_disk: Path) -> None:
    with start_server(*flags_for(t2v_folder, small_disk), fault="decode:slow:2") as server:
        earlier = wait(server, create(server)["id"])["id"]
        video = create(server)["id"]
        wait_for_folder(small_disk, video)
        ballast = small_disk / "ballast"
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(8 << 20))
        refused = post(server, TINY)
        assert_error(refused, 503, "storage_full")
        assert refused.headers["x-should-retry"] == "false"
        job = wait(server, video)
        assert (job["status"], job["error"]["code"]) == ("failed", "storage_full")
        assert delete(server, earlier).status_code == 200, "a full disk can be tidied"
        ballast.unlink()
        assert wait(server, create(server)["id"])["status"] == "completed"
