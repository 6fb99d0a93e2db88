"""Jobs on the disk: what was accepted is found again, by its owner, once, whatever was killed meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from multimodal_gen.adapters import Pin
from multimodal_gen.engine.job_files import JobFiles
from multimodal_gen.engine.job_queue import MAX_AT_ONCE, JobQueue, Running, next_in_turn
from multimodal_gen.engine.job_rows import JobRows
from multimodal_gen.engine.jobs import RESENT_S, Job, Jobs, OneThread
from multimodal_gen.errors import ConfigError, IdempotencyMismatch, QueueFull, ShuttingDown, StorageFull
from multimodal_gen.media.arrays import from_numpy, to_numpy
from multimodal_gen.messages import RowState
from multimodal_gen.request import VideoRequest

pytestmark = [pytest.mark.unit]

ROOT = Path(__file__).parents[2]
REQUEST = VideoRequest(
    id="video_1", model="m", prompt="a cat", negative_prompt="blurry", width=64, height=64, num_inference_steps=4,
    guidance_scale=5.0, seeds=(1, 2**63 - 1), max_sequence_length=9, num_frames=17, fps=16, image=bytes(999),
    loras=(Pin("transformer", "a", "d" * 64, 0.1),), own_loras=True, checkpoint_every=5, flow_shift=0.1, row_tokens=7,
)  # fmt: skip


def job(number: int = 1, **fields: Any) -> Job:
    defaults = {
        "id": f"video_{number}", "owner": "alice", "model": "m", "prompt": "a cat", "seconds": "4", "size": "64x64",
        "outputs": 2, "output_format": "mp4", "facts": "{}", "created_at": 1000 + number, "body_hash": f"h{number}",
        "priority": 0, "fair_key": "k", "cost": 5,
    }  # fmt: skip
    return Job(**{**defaults, **fields})


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jobs.sqlite")


def test_a_job_is_found_as_it_was_accepted(tmp_path: Path, jobs: Jobs) -> None:
    accepted = jobs.add(job(), REQUEST, 10)
    assert accepted == msgspec.structs.replace(job(), number=1)
    jobs.close()
    again = Jobs(tmp_path / "jobs.sqlite")
    assert again.find("video_1", "alice") == accepted
    assert again.request("video_1") == REQUEST
    assert again.unfinished() == [accepted]


def test_what_add_returned_survives_kill_9(tmp_path: Path) -> None:
    code = f"""
        import sys, os, signal
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tests.unit.test_jobs import Jobs, REQUEST, job
        jobs = Jobs(Path({str(tmp_path)!r}, "jobs.sqlite"))
        for number in range(1, 6):
            jobs.add(job(number), REQUEST, 10)
            print(number, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.split() == ["1", "2", "3", "4", "5"]
    assert [found.number for found in Jobs(tmp_path / "jobs.sqlite").unfinished()] == [1, 2, 3, 4, 5]


def test_the_disk_is_asked_to_keep_every_commit(jobs: Jobs) -> None:
    assert jobs._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert jobs._db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"


def test_another_owner_sees_nothing(jobs: Jobs) -> None:
    jobs.add(job(), REQUEST, 10)
    assert jobs.find("video_1", "bob") is None
    assert jobs.page("bob", None, 10, newest_first=True, now=0) == []


def test_the_same_key_and_body_is_the_same_job(jobs: Jobs) -> None:
    first = jobs.add(job(1, idempotency_key="k", body_hash="h"), REQUEST, 10)
    assert jobs.add(job(2, idempotency_key="k", body_hash="h"), REQUEST, 10) == first
    assert jobs.find_key("alice", "k", "h") == first
    assert len(jobs.unfinished()) == 1


def test_the_same_key_with_another_body_is_refused(jobs: Jobs) -> None:
    jobs.add(job(1, idempotency_key="k", body_hash="h"), REQUEST, 10)
    with pytest.raises(IdempotencyMismatch):
        jobs.add(job(2, idempotency_key="k", body_hash="other"), REQUEST, 10)
    assert jobs.add(job(3, idempotency_key="k", body_hash="other", owner="bob"), REQUEST, 10).number == 2


def test_a_resent_body_is_found_for_a_while(jobs: Jobs) -> None:
    jobs.add(job(1, body_hash="h"), REQUEST, 10)
    assert jobs.find_resent("alice", "h", 1001 + RESENT_S - 1) is not None
    assert jobs.find_resent("alice", "h", 1001 + RESENT_S) is None
    assert jobs.find_resent("bob", "h", 1001) is None


def test_the_queue_is_bounded_by_unfinished_jobs(jobs: Jobs) -> None:
    jobs.add(job(1), REQUEST, 2)
    jobs.add(job(2), REQUEST, 2)
    with pytest.raises(QueueFull):
        jobs.add(job(3), REQUEST, 2)
    jobs.update("video_1", status="completed")
    jobs.add(job(3), REQUEST, 2)


def test_pages_go_both_ways_and_leave_out_what_expired(jobs: Jobs) -> None:
    for number in range(1, 6):
        jobs.add(job(number), REQUEST, 10)
    jobs.update("video_3", status="completed", expires_at=500)

    def numbers(after: int | None, limit: int, newest_first: bool) -> list[int]:
        return [found.number for found in jobs.page("alice", after, limit, newest_first=newest_first, now=600)]

    assert numbers(None, 3, True) == [5, 4, 2]
    assert numbers(2, 3, True) == [1]
    assert numbers(None, 2, False) == [1, 2]
    assert numbers(2, 9, False) == [4, 5]
    assert [found.number for found in jobs.expired(600)] == [3]
    assert jobs.expired(400) == []


def test_a_job_that_ended_does_not_change_any_more(jobs: Jobs) -> None:
    jobs.add(job(), REQUEST, 10)
    jobs.update("video_1", status="completed", progress=100)
    jobs.update("video_1", status="queued", progress=0)
    found = jobs.find("video_1")
    assert found is not None
    assert (found.status, found.progress) == ("completed", 100)


def test_a_deleted_job_is_gone_with_its_request(jobs: Jobs) -> None:
    jobs.add(job(1, idempotency_key="k"), REQUEST, 10)
    assert jobs.delete("video_1")
    assert not jobs.delete("video_1")
    assert jobs._db.execute("SELECT count(*) FROM requests").fetchone() == (0,)
    with pytest.raises(KeyError):
        jobs.request("video_1")
    assert jobs.add(job(1, idempotency_key="k"), REQUEST, 10).number == 2, "numbers are never used again"


def test_a_full_disk_is_told_and_changes_nothing(jobs: Jobs) -> None:
    jobs.add(job(1), REQUEST, 1000)
    (pages,) = jobs._db.execute("PRAGMA page_count").fetchone()
    jobs._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StorageFull, match="disk is full"):
        _ = [jobs.add(job(number), REQUEST, 1000) for number in range(2, 100)]
    kept = len(jobs.unfinished())
    jobs._db.execute("PRAGMA max_page_count = 100000")
    assert jobs.add(job(500), REQUEST, 1000).id == "video_500"
    assert len(jobs.unfinished()) == kept + 1


def test_a_later_database_is_refused(tmp_path: Path, jobs: Jobs) -> None:
    jobs._db.execute("PRAGMA user_version = 99")
    jobs.close()
    with pytest.raises(ConfigError, match="later version"):
        Jobs(tmp_path / "jobs.sqlite")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match="job database"):
        Jobs(tmp_path / "jobs.sqlite")


def test_the_next_job_has_the_highest_priority_then_the_idlest_user_then_the_greatest_age() -> None:
    def numbered(number: int, user: str, priority: int = 0) -> Job:
        return msgspec.structs.replace(job(number, fair_key=user, priority=priority), number=number)

    alices = [numbered(number, "alice") for number in (1, 2, 3)]
    bobs = [numbered(number, "bob") for number in (4, 5)]
    urgent = numbered(6, "alice", priority=1)
    assert next_in_turn([*alices, *bobs], []).number == 1
    assert next_in_turn([*alices[1:], *bobs], alices[:1]).number == 4
    assert next_in_turn([*alices[1:], *bobs[1:]], [alices[0], bobs[0]]).number == 2
    assert next_in_turn([*alices, *bobs, urgent], alices).number == 6


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    made = JobFiles(tmp_path)
    made.begin("v")
    return made


def state(index: int, step: int) -> RowState:
    latents = np.random.default_rng(step).standard_normal((4, 3, 2)).astype(np.float32)
    return RowState(index, step, {"latents": from_numpy(latents), "m 0": from_numpy(np.float32([np.pi, -0.0, 1e-45]))})


def test_a_checkpoint_comes_back_bit_for_bit(files: JobFiles) -> None:
    files.save("v", state(1, 5))
    (back,) = files.resume("v")
    assert (back.index, back.step, list(back.tensors)) == (1, 5, ["latents", "m 0"])
    for name, array in state(1, 5).tensors.items():
        assert to_numpy(back.tensors[name]).tobytes() == to_numpy(array).tobytes()
        assert back.tensors[name].shape == array.shape


def test_the_last_two_of_every_row_are_kept(tmp_path: Path, files: JobFiles) -> None:
    for step in (5, 10, 15):
        files.save("v", state(0, step))
    files.save("v", state(1, 5))
    assert sorted(os.listdir(tmp_path / "videos" / "v")) == [
        "row-0-step-10.safetensors", "row-0-step-15.safetensors", "row-1-step-5.safetensors",
    ]  # fmt: skip
    assert [(s.index, s.step) for s in files.resume("v")] == [(0, 15), (1, 5)]


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None], ids=["empty", "zeros", "cut"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, files: JobFiles, damage: bytes | None
) -> None:
    for step in (5, 10):
        files.save("v", state(0, step))
    path = tmp_path / "videos" / "v" / "row-0-step-10.safetensors"
    path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
    assert [s.step for s in files.resume("v")] == [5]


def test_a_checkpoint_under_another_name_is_not_believed(tmp_path: Path, files: JobFiles) -> None:
    files.save("v", state(0, 5))
    folder = tmp_path / "videos" / "v"
    (folder / "row-0-step-5.safetensors").rename(folder / "row-0-step-10.safetensors")
    assert files.resume("v") == []


@pytest.mark.parametrize("next_call", ["begin", "discard_checkpoints"])
def test_half_written_files_leave_with_the_next_try_and_with_the_end(
    tmp_path: Path, files: JobFiles, next_call: str
) -> None:
    folder = tmp_path / "videos" / "v"
    for name in ("0.mp4", "1.mp4.0a1b2c3d.part", "1.webp.0a1b2c3d.part", "row-0-step-5.part"):
        (folder / name).write_bytes(b"x")
    {"begin": files.begin, "discard_checkpoints": files.discard_checkpoints}[next_call]("v")
    assert os.listdir(folder) == ["0.mp4"]


def test_sweeping_removes_what_belongs_to_nobody(tmp_path: Path, files: JobFiles) -> None:
    for name in ("running", "done"):
        files.begin(name)
        files.save(name, state(0, 5))
        (tmp_path / "videos" / name / "0.mp4").write_bytes(b"x")
        (tmp_path / "videos" / name / "1.mp4.part").write_bytes(b"x")
    files.sweep({"running": False, "done": True})
    assert sorted(os.listdir(tmp_path / "videos")) == ["done", "running"]
    assert sorted(os.listdir(tmp_path / "videos" / "done")) == ["0.mp4"]
    assert sorted(os.listdir(tmp_path / "videos" / "running")) == ["0.mp4", "row-0-step-5.safetensors"]


def test_a_folder_has_one_server_at_a_time(tmp_path: Path) -> None:
    first = JobFiles(tmp_path)
    with pytest.raises(ConfigError, match="Another server"):
        JobFiles(tmp_path)
    first.close()
    JobFiles(tmp_path).close()


def test_other_users_of_the_machine_cannot_look_in(tmp_path: Path) -> None:
    JobFiles(tmp_path / "data" / "model").close()
    assert (tmp_path / "data" / "model").stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--data-dir"):
        JobFiles(tmp_path / "file")


def test_a_job_that_cannot_fit_the_disk_is_refused(files: JobFiles) -> None:
    files.check_room(REQUEST)
    with pytest.raises(StorageFull, match="disk is full"):
        files.check_room(msgspec.structs.replace(REQUEST, num_frames=10**15 + 1))


# --- the queue and the rows in memory -------------------------------------------------------------------------------


def queue_of(*numbers: int, cost: int = 5) -> JobQueue:
    jobs = [msgspec.structs.replace(job(number, cost=cost), number=number) for number in numbers]
    return JobQueue(waiting={found.id: found for found in jobs})


def test_the_engine_gets_no_more_than_it_may_hold() -> None:
    queue = queue_of(1, 2, 3, cost=5)
    first = queue.take(0, 4)
    assert first is not None, "one job is taken whatever it costs"
    assert queue.take(5, 9) is None
    assert queue.take(5, 10) is not None
    assert [len(queue.waiting), len(queue.running)] == [1, 2]


def test_waiting_requests_stay_on_the_disk() -> None:
    queue = queue_of(*range(1, 30))
    while queue.take(0, 10**9) is not None:
        continue
    assert len(queue.running) == MAX_AT_ONCE
    assert queue.unstarted == 29


def test_positions_count_what_comes_before() -> None:
    queue = queue_of(1, 2, 3, 4)
    queue.waiting["video_4"] = msgspec.structs.replace(queue.waiting["video_4"], priority=1)
    waiting = dict(queue.waiting)
    assert [queue.position(waiting[f"video_{i}"]) for i in (1, 2, 3, 4)] == [1, 2, 3, 0]
    running = queue.take(0, 99)
    assert running is not None
    assert running.job.id == "video_4"
    assert [queue.position(waiting[f"video_{i}"]) for i in (4, 1, 2)] == [0, 1, 2]
    running.started = True
    assert [queue.position(waiting[f"video_{i}"]) for i in (4, 1, 2)] == [None, 0, 1]
    assert (queue.unstarted, queue.started) == (3, 1)


def test_progress_counts_the_steps_of_all_rows_and_never_says_done() -> None:
    running = Running(job(), rows={0: 5, 1: 0}, steps=20)
    assert running.progress == 24
    running.rows = {0: 10, 1: 10}
    assert running.progress == 99
    assert Running(job()).progress == 0


def test_what_the_disk_cannot_take_is_shown_and_written_later(jobs: Jobs) -> None:
    disk = OneThread("test")
    rows = JobRows(jobs, disk)
    added = jobs.add(job(), REQUEST, 10)
    jobs._db.execute("PRAGMA query_only = ON")  # a disk that takes nothing

    async def scenario() -> None:
        assert not await rows.update("video_1", status="in_progress", progress=5)
        assert not await rows.update("video_1", status="failed", error_code="storage_full")
        shown = rows.current(added)
        assert (shown.status, shown.progress, shown.error_code) == ("failed", 5, "storage_full")
        jobs._db.execute("PRAGMA query_only = OFF")
        await rows.retry()

    asyncio.run(scenario())
    found = jobs.find("video_1")
    assert found is not None
    assert (found.status, found.progress, found.error_code) == ("failed", 5, "storage_full")
    assert rows.current(found) is found
    disk.close()
    with pytest.raises(ShuttingDown):
        asyncio.run(disk(jobs.ids))
