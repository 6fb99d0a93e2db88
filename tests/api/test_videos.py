"""`/v1/videos` with the unmodified `openai` client and over plain HTTP."""

from __future__ import annotations

import io
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
import pytest
from PIL import Image

from multimodal_gen.media.recipe import read_recipe
from tests.support.adapters import make_adapter_for
from tests.support.server import Server, assert_error, start_server, wait_for
from tests.support.videos import TINY, create, delete, download, get, made, post, post_form, wait

pytestmark = [pytest.mark.api, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]

SETTINGS = {"num_inference_steps": 2, "seed": 1, "fps": 8}


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url + "/v1", api_key=server.api_key or "none", max_retries=0)


def frames_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def png(size: tuple[int, int] = (80, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def test_the_openai_client_from_create_to_delete(video_server: Server, tmp_path: Path) -> None:
    client = client_of(video_server)
    video = client.videos.create(prompt="a red apple", seconds="1", size="64x64", model="tiny-t2v", extra_body=SETTINGS)
    assert (video.object, video.status, video.seconds, video.size) == ("video", "queued", "1", "64x64")
    assert (video.model, video.prompt, video.progress) == ("tiny-t2v", "a red apple", 0)
    done = client.videos.poll(video.id)
    assert (done.id, done.status, done.progress, done.error) == (video.id, "completed", 100, None)
    assert done.completed_at is not None
    assert done.expires_at == done.completed_at + 86400
    path = tmp_path / "video.mp4"
    client.videos.download_content(video.id).write_to_file(path)
    assert frames_of(path.read_bytes()).shape == (9, 64, 64, 3)  # 8 frames are asked for, 9 = 4k + 1 is next to them
    recipe = read_recipe(path)
    assert (recipe.prompt, recipe.seeds, recipe.num_frames, recipe.fps) == ("a red apple", (1,), 9, 8)
    for variant, kind in (("thumbnail", "WEBP"), ("spritesheet", "JPEG")):
        with Image.open(io.BytesIO(client.videos.download_content(video.id, variant=variant).content)) as image:
            assert image.format == kind
    other = client.videos.remix(video.id, prompt="a green apple")
    assert (other.remixed_from_video_id, other.prompt, other.seconds) == (video.id, "a green apple", "1.125")
    assert client.videos.poll(other.id).status == "completed"
    assert [found.id for found in client.videos.list(limit=1)][:2] == [other.id, video.id], "pages follow by themselves"
    assert client.videos.retrieve(video.id).status == "completed"
    gone = client.videos.delete(video.id)
    assert (gone.id, gone.object, gone.deleted) == (video.id, "video.deleted", True)
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_create_and_poll_with_a_picture(image_video_server: Server) -> None:
    client = client_of(image_video_server)
    done = client.videos.create_and_poll(
        prompt="it moves", size="64x64", input_reference=("../../x.py", png()), extra_body={**SETTINGS, "num_frames": 5}
    )
    assert done.status == "completed"


def test_a_form_and_json_make_the_same_video(video_server: Server) -> None:
    job = post_form(video_server, {**{name: str(value) for name, value in TINY.items()}, "loras": "[]", "n": ""}).json()
    assert wait(video_server, job["id"])["status"] == "completed"
    assert download(video_server, job["id"]).content == made(video_server, loras=[])


def test_a_picture_as_a_file_and_as_a_data_url_make_the_same_video(image_video_server: Server) -> None:
    import base64

    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    first = made(image_video_server, input_reference={"image_url": url})
    job = post_form(image_video_server, {name: str(value) for name, value in TINY.items()}, png()).json()
    assert wait(image_video_server, job["id"])["status"] == "completed"
    assert download(image_video_server, job["id"]).content == first
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "WEBP")
    other = base64.b64encode(buffer.getvalue()).decode()
    assert made(image_video_server, input_reference={"image_url": "data:image/webp;base64," + other}) != first


def test_a_remix_keeps_everything_but_what_it_says(image_video_server: Server) -> None:
    import base64

    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    first = create(image_video_server, input_reference={"image_url": url}, n=2, fps=4, negative_prompt="blurry",
                   num_inference_steps=4, step_cache="taylor:warmup=1,order=0")  # fmt: skip
    assert first["step_cache"] == "taylor:interval=2,order=0,warmup=1"
    wait(image_video_server, first["id"])
    path = f"/v1/videos/{first['id']}/remix"
    same = post(image_video_server, {"prompt": TINY["prompt"]}, path).json()
    ignored = ("id", "created_at", "expires_at", "completed_at", "status", "progress", "queue_position")
    for name in set(first) - {*ignored, "remixed_from_video_id"}:
        assert same[name] == first[name], name
    wait(image_video_server, same["id"])
    for index in (0, 1):
        files = [download(image_video_server, job["id"], f"?index={index}").content for job in (first, same)]
        assert files[0] == files[1], "the same prompt, picture, seeds and settings"
    other = post(image_video_server, {"prompt": "x", "n": 1, "num_frames": 9, "guidance_scale": 1.0,
                                      "negative_prompt": "", "num_inference_steps": 2}, path).json()  # fmt: skip
    assert other["step_cache"] == "none", "two steps are too few for the cache of the first"
    assert (other["n"], other["seeds"], other["num_frames"], other["fps"]) == (1, [1], 9, 4)
    assert wait(image_video_server, other["id"])["status"] == "completed"


@pytest.mark.parametrize(("kind", "media"), [("webm", "video/webm"), ("gif", "image/gif")])
def test_other_formats(video_server: Server, kind: str, media: str) -> None:
    job = wait(video_server, create(video_server, output_format=kind)["id"])
    answer = download(video_server, job["id"])
    assert answer.headers["content-type"] == media
    assert answer.headers["content-disposition"] == f'inline; filename="{job["id"]}.{kind}"'
    assert frames_of(answer.content).shape == (5, 64, 64, 3)


def test_several_videos_of_one_request_have_their_own_seeds_and_files(video_server: Server) -> None:
    job = wait(video_server, create(video_server, n=2, seed=7)["id"])
    assert (job["n"], job["seeds"]) == (2, [7, 8])
    first, second = (download(video_server, job["id"], f"?index={i}").content for i in (0, 1))
    assert first != second
    assert np.array_equal(frames_of(second), frames_of(made(video_server, seed=8)))
    assert_error(download(video_server, job["id"], "?index=2"), 400, "invalid_value", "index")


@pytest.fixture(scope="module")
def slow_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of `slow`."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def slow_server(t2v_folder: Path, slow_data: Path) -> Iterator[Server]:
    """Each step takes half a second and belongs to one row; at most three jobs may wait or run."""
    flags = ("--model-path", str(t2v_folder), "--data-dir", str(slow_data), "--checkpoint-every", "1")
    limits = ("--max-batch-tokens", "1", "--max-jobs", "3")
    with start_server(*flags, *limits, fault="denoise:slow:100000") as server:
        yield server


@pytest.fixture
def slow(slow_server: Server, slow_data: Path) -> Iterator[Server]:
    """The slow server without jobs, before and after."""
    yield slow_server
    for job in slow_server.get("/v1/videos?limit=100").json()["data"]:
        delete(slow_server, job["id"])
    wait_for(lambda: unanswered(slow_server) == 0, 10, "the end of the work")
    assert not list(slow_data.glob("*/videos/*"))


def unanswered(server: Server) -> float:
    """Requests that the engine holds."""
    return server.metric("mmgen_running") + server.metric("mmgen_queue_depth")


def test_progress_rises_step_by_step_and_the_queue_has_positions(slow: Server) -> None:
    # Smaller ones would pass the first, half a second later.
    first, second, third = (create(slow, num_inference_steps=5)["id"] for _ in range(3))
    wait(slow, first, "in_progress")
    assert [get(slow, job)["queue_position"] for job in (first, second, third)] == [None, 0, 1]
    seen: list[int] = []
    while (job := get(slow, first))["status"] == "in_progress":
        seen.append(job["progress"])
        time.sleep(0.02)
    assert seen == sorted(seen)
    assert {0, 19, 39, 59, 79} <= set(seen), "a step of five is a fifth of 99"
    assert max(seen) < 100
    assert wait(slow, third)["progress"] == 100
    assert slow.metric('mmgen_jobs{status="queued"}') == 0
    assert slow.metric("mmgen_videos_total") >= 3
    wait_for(lambda: slow.metric('mmgen_jobs_done_total{outcome="completed"}') >= 3, 5, "the count")


def test_polling_is_told_when_there_may_be_news(slow: Server) -> None:
    first, second = (create(slow, num_inference_steps=50)["id"] for _ in range(2))
    wait_for(lambda: get(slow, first)["progress"] > 0, 20, "a step")
    for job in (first, second):
        assert 250 <= int(slow.get(f"/v1/videos/{job}").headers["openai-poll-after-ms"]) <= 5000
    delete(slow, first)
    done = wait(slow, create(slow, num_inference_steps=1, priority=0)["id"])
    assert "openai-poll-after-ms" not in slow.get(f"/v1/videos/{done['id']}").headers


def test_delete_stops_within_a_step_and_removes_the_files(slow: Server, slow_data: Path) -> None:
    jobs = [create(slow, num_inference_steps=500)["id"] for _ in range(2)]
    wait_for(lambda: bool(list(slow_data.glob(f"*/videos/{jobs[0]}/row-*"))), 20, "a checkpoint")
    cancelled = slow.metric("mmgen_cancelled_total")
    began = time.monotonic()
    for job in jobs:
        assert delete(slow, job).json() == {"id": job, "object": "video.deleted", "deleted": True}
        assert_error(slow.get(f"/v1/videos/{job}"), 404, "not_found")
        assert not list(slow_data.glob(f"*/videos/{job}"))
    wait_for(lambda: unanswered(slow) == 0, 5, "the stop")
    assert time.monotonic() - began < 2.0, "one step of half a second, not five hundred"
    assert_error(delete(slow, jobs[0]), 404, "not_found")
    assert slow.metric("mmgen_cancelled_total") == cancelled + 2


def test_a_waiting_job_can_be_deleted(slow: Server) -> None:
    first, second = create(slow, num_inference_steps=3)["id"], create(slow)["id"]
    assert delete(slow, second).status_code == 200
    assert wait(slow, first)["status"] == "completed"
    assert [job["id"] for job in slow.get("/v1/videos").json()["data"]] == [first]
    assert slow.metric("mmgen_queue_depth") == 0


def test_the_queue_is_bounded(slow: Server) -> None:
    jobs = [create(slow, num_inference_steps=500)["id"] for _ in range(3)]
    refused = post(slow, TINY)
    assert_error(refused, 429, "queue_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert slow.metric('mmgen_rejected_total{reason="queue_full"}') == 1
    delete(slow, jobs[1])
    create(slow)


def test_ranges_of_a_file(video_server: Server) -> None:
    job = wait(video_server, create(video_server)["id"])
    whole = download(video_server, job["id"])
    data, tag = whole.content, whole.headers["etag"]
    assert whole.headers["accept-ranges"] == "bytes"
    assert int(whole.headers["content-length"]) == len(data)
    for text, start, end in (
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, len(data)),
        ("bytes=-7", len(data) - 7, len(data)),
    ):
        part = download(video_server, job["id"], range=text)
        assert part.status_code == 206
        assert part.content == data[start:end]
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{len(data)}"
        assert part.headers["etag"] == tag
    assert download(video_server, job["id"], range="bytes=0-9", **{"if-range": tag}).status_code == 206
    assert download(video_server, job["id"], range="bytes=0-9", **{"if-range": '"old"'}).content == data
    assert download(video_server, job["id"], **{"if-none-match": tag}).status_code == 304
    many = "bytes=" + ",".join(f"{i}-{i}" for i in range(10_000))
    for text in ("bytes=0-1,5-6", many, f"bytes={len(data)}-", "bytes=9-1", "pages=1-2", "bytes=a"):
        began = time.monotonic()
        refused = download(video_server, job["id"], range=text)
        assert_error(refused, 416, "invalid_range", "Range")
        assert refused.headers["content-range"] == f"bytes */{len(data)}"
        assert time.monotonic() - began < 1


@pytest.fixture(scope="module")
def two_keys(t2v_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two keys: `mine`, and `other`, the admin's."""
    flags = ("--model-path", str(t2v_folder), "--data-dir", str(tmp_path_factory.mktemp("jobs")))
    with start_server(*flags, "--admin-api-key", "other", api_key="mine") as server:
        yield server


def test_the_list_is_paged_in_both_orders(two_keys: Server) -> None:
    two_keys.api_key = "other"
    empty = two_keys.get("/v1/videos").json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    made_ids = [create(two_keys, num_frames=1)["id"] for _ in range(5)]
    for order, wanted in (("asc", made_ids), ("desc", made_ids[::-1])):
        page = two_keys.get(f"/v1/videos?limit=2&order={order}").json()
        assert [job["id"] for job in page["data"]] == wanted[:2]
        assert (page["first_id"], page["last_id"], page["has_more"]) == (wanted[0], wanted[1], True)
        page = two_keys.get(f"/v1/videos?limit=100&order={order}&after={wanted[1]}").json()
        assert [job["id"] for job in page["data"]] == wanted[2:]
        assert page["has_more"] is False
    assert [job["id"] for job in two_keys.get("/v1/videos").json()["data"]] == made_ids[::-1]
    for job in made_ids:
        delete(two_keys, job)


def test_the_same_idempotency_key_makes_one_video(video_server: Server) -> None:
    first = post(video_server, TINY, idempotency_key="k1").json()
    again = post(video_server, {**TINY, "negative_prompt": None}, idempotency_key="k1")
    assert again.status_code == 200
    assert again.json()["id"] == first["id"]
    wait(video_server, first["id"])
    assert post(video_server, TINY, idempotency_key="k1").json()["status"] == "completed"
    assert_error(post(video_server, {**TINY, "seed": 2}, idempotency_key="k1"), 409, "idempotency_mismatch")
    assert post(video_server, {**TINY, "seed": 2}, idempotency_key="k2").json()["id"] != first["id"]
    remixed = [post(video_server, {"prompt": "x"}, f"/v1/videos/{first['id']}/remix", idempotency_key="k3").json()["id"]
               for _ in range(2)]  # fmt: skip
    assert remixed[0] == remixed[1]
    for key in ("a b", "", "k" * 256):
        assert_error(post(video_server, TINY, idempotency_key=key), 400, "invalid_value", "Idempotency-Key")


def test_twenty_sendings_at_once_with_one_key_make_one_video(video_server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: post(video_server, TINY, idempotency_key="at-once"), range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_what_the_openai_client_sends_again_by_itself_makes_one_video(video_server: Server) -> None:
    body = {**TINY, "prompt": "sent twice"}
    first = post(video_server, body).json()["id"]
    assert post(video_server, body, x_stainless_retry_count="1").json()["id"] == first
    assert post(video_server, body, x_stainless_retry_count="0").json()["id"] != first


def test_another_key_finds_nothing(two_keys: Server) -> None:
    two_keys.api_key = "mine"
    job = wait(two_keys, create(two_keys)["id"])
    two_keys.api_key = "other"
    path = f"/v1/videos/{job['id']}"
    for answer in (
        two_keys.get(path),
        download(two_keys, job["id"]),
        delete(two_keys, job["id"]),
        post(two_keys, {"prompt": "x"}, path + "/remix"),
    ):
        assert_error(answer, 404, "not_found")
    assert two_keys.get("/v1/videos").json()["data"] == []
    assert_error(two_keys.get(f"/v1/videos?after={job['id']}"), 400, "invalid_value", "after")
    theirs = post(two_keys, TINY, idempotency_key="k").json()["id"]
    two_keys.api_key = "mine"
    assert post(two_keys, TINY, idempotency_key="k").json()["id"] != theirs
    assert two_keys.get(path).status_code == 200


def test_videos_deleted_at_any_moment_leave_nothing_behind(t2v_folder: Path, tmp_path: Path) -> None:
    import random

    dice = random.Random(3)
    flags = ("--model-path", str(t2v_folder), "--data-dir", str(tmp_path), "--checkpoint-every", "1")
    with start_server(*flags) as server:
        for _ in range(15):
            job = create(server, num_inference_steps=8, n=dice.choice((1, 2)))
            time.sleep(dice.uniform(0, 1.2))
            assert delete(server, job["id"]).status_code == 200
            assert not list(tmp_path.glob("*/videos/*"))
        wait_for(lambda: server.metric("mmgen_running") + server.metric("mmgen_queue_depth") == 0, 10, "the end")
        assert server.metric('mmgen_jobs{status="in_progress"}') == 0
        assert wait(server, create(server)["id"])["status"] == "completed"
        assert "Traceback" not in server.log
        assert "failed" not in server.log


def test_finished_videos_expire(t2v_folder: Path, tmp_path: Path) -> None:
    with start_server("--model-path", str(t2v_folder), "--data-dir", str(tmp_path), "--job-ttl-s", "2") as server:
        job = wait(server, create(server)["id"])
        assert job["expires_at"] - job["completed_at"] == 2
        assert download(server, job["id"]).status_code == 200
        wait_for(lambda: server.get(f"/v1/videos/{job['id']}").status_code == 404, 10, "the expiry")
        assert_error(download(server, job["id"]), 404, "not_found")
        wait_for(lambda: not list(tmp_path.glob("*/videos/*")), 10, "the removal")


def test_a_failed_job_says_why(t2v_folder: Path, tmp_path: Path) -> None:
    with start_server("--model-path", str(t2v_folder), "--data-dir", str(tmp_path), fault="decode:oom:1") as server:
        job = wait(server, create(server)["id"])
        assert (job["status"], job["completed_at"]) == ("failed", None)
        assert job["error"]["code"] == "out_of_memory"
        assert set(job["error"]) == {"code", "message", "type", "param"}
        refused = download(server, job["id"])
        assert_error(refused, 409, "video_not_ready")
        assert refused.headers["x-should-retry"] == "false"
        assert server.metric('mmgen_jobs_done_total{outcome="out_of_memory"}') == 1
        assert wait(server, create(server)["id"])["status"] == "completed"


def test_answers_name_no_place_on_the_server(video_server: Server) -> None:
    job = wait(video_server, create(video_server)["id"])
    text = json.dumps(job) + video_server.get("/v1/videos").text + str(download(video_server, job["id"]).headers)
    assert "/tmp" not in text
    assert "jobs.sqlite" not in text


def test_a_video_has_the_adapters_that_it_was_given(t2v_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "loras"
    make_adapter_for(t2v_folder, root / "a.safetensors")
    data = tmp_path / "data"
    flags = ("--model-path", str(t2v_folder), "--data-dir", str(data), "--lora-root", str(root), "--deterministic")
    with start_server(*flags) as server:
        plain = made(server)
        post(server, {"lora_nickname": "a", "lora_path": "a.safetensors"}, "/v1/set_lora").raise_for_status()
        changed = made(server)
        assert frames_of(changed).tobytes() != frames_of(plain).tobytes()
        assert frames_of(made(server, loras=[])).tobytes() == frames_of(plain).tobytes()
        job = create(server, loras=[{"nickname": "a", "strength": 0.5}])
        assert job["loras"] == [{"nickname": "a", "strength": 0.5, "target": "transformer"}]
        assert wait(server, job["id"])["status"] == "completed"
        assert_error(post(server, {**TINY, "loras": [{"nickname": "b"}]}), 404, "adapter_not_found", "loras")


def test_videos_of_a_model_of_images(server: Server) -> None:
    warnings.simplefilter("ignore")
    for answer in (post(server, TINY), server.get("/v1/videos"), server.get("/v1/videos/x"),
                   post_form(server, {"prompt": "x"})):  # fmt: skip
        message = assert_error(answer, 400, "unsupported_endpoint")
        assert "POST /v1/images/generations" in message


def test_images_of_a_model_of_videos(video_server: Server) -> None:
    body: dict[str, Any] = {"prompt": "x"}
    assert "POST /v1/videos" in assert_error(video_server.post(body), 400, "unsupported_endpoint")
