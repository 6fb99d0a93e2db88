"""`kill -9` of everything a server consists of, and what it must have kept."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from tests.support.server import Server, start_server
from tests.support.videos import TINY, download, get, post, wait

# Different in all that a job can differ in; each takes a second or two.
JOBS: list[dict[str, Any]] = [
    {
        **TINY,
        "prompt": f"apple {i}",
        "seed": 100 + i,
        "num_inference_steps": 12 + 7 * (i % 4),
        "num_frames": 5 + 4 * (i % 3),
        "size": ("64x64", "96x64", "32x48")[i % 3],
        "n": 1 + i % 2,
        "output_format": ("mp4", "mp4", "webm", "gif")[i % 4],
    }
    for i in range(10)
]


def kill_all(server: Server) -> None:
    """SIGKILL the front, and whatever of its worker and helpers the kernel has not killed by then."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGKILL)
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    server.process.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive, "a process outlived its front"


def flags_for(model: Path, data: Path, *more: str) -> tuple[str, ...]:
    """A server whose results do not depend on who shares a batch, with many checkpoints."""
    return ("--model-path", str(model), "--data-dir", str(data), "--deterministic", "--checkpoint-every", "3", *more)


def contents(server: Server, ids: list[str]) -> list[list[bytes]]:
    """The files of jobs, once they are all completed."""
    files = []
    for video_id in ids:
        job = wait(server, video_id)
        assert job["status"] == "completed", job
        files.append([download(server, video_id, f"?index={index}").content for index in range(job["n"])])
    return files


def undisturbed(model: Path, data: Path, jobs: list[dict[str, Any]]) -> list[list[bytes]]:
    """What the jobs come to when nothing happens to them."""
    with start_server(*flags_for(model, data)) as server:
        return contents(server, [post(server, job).json()["id"] for job in jobs])


def disturbed(
    model: Path, data: Path, jobs: list[dict[str, Any]], *, kills: int, seed: int, longest_s: float
) -> tuple[list[list[bytes]], dict[str, int]]:
    """What the jobs come to on a server that is killed so often, at random moments; and what happened to it."""
    dice = random.Random(seed)
    ids: dict[int, str] = {}
    seen = {"kills": 0, "resumed": 0}
    for _ in range(kills):
        with start_server(*flags_for(model, data)) as server:
            for video_id in ids.values():
                get(server, video_id)  # each acknowledged id resolves
            moment = time.monotonic() + dice.uniform(0.0, longest_s)
            while len(ids) < len(jobs) and time.monotonic() < moment:
                index = len(ids)
                answer = post(server, jobs[index], idempotency_key=f"job-{index}")
                assert answer.status_code == 200, answer.text[:300]
                ids[index] = answer.json()["id"]
                time.sleep(dice.uniform(0.0, 0.3))
            time.sleep(max(0.0, moment - time.monotonic()))
            seen["resumed"] += int(server.metric("mmgen_jobs_resumed_total"))
            kill_all(server)
            seen["kills"] += 1
    with start_server(*flags_for(model, data)) as server:
        for index in range(len(ids), len(jobs)):
            ids[index] = post(server, jobs[index], idempotency_key=f"job-{index}").json()["id"]
        files = contents(server, [ids[index] for index in range(len(jobs))])
        seen["resumed"] += int(server.metric("mmgen_jobs_resumed_total"))
        listed = [job["id"] for job in server.get("/v1/videos?limit=100&order=asc").json()["data"]]
        assert listed == [ids[index] for index in range(len(jobs))], "nothing is lost and nothing is made twice"
    return files, seen
