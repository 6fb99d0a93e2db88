"""One server for pictures and text: both models are listed, each answers for itself, and one rewrites for the other."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from tests.support.server import QUICK, Server, assert_error, start_server, wait_for

pytestmark = [pytest.mark.api]

CHAT = "/v1/chat/completions"
SMALL = ("--llm-path", "smollm2", "--kv-cache-memory", "128MiB")


@pytest.fixture
def both(both_server: Server) -> Iterator[Server]:
    """Whatever a test does to it, its worker lives on."""
    before = both_server.worker_pid()
    yield both_server
    assert both_server.worker_pid() == before


def post(server: Server, path: str, body: dict[str, Any]) -> httpx2.Response:
    headers = {"content-type": "application/json"}
    return server.client.post(server.base_url + path, content=json.dumps(body).encode(), headers=headers)


def chat(server: Server, tokens: int = 4, **more: Any) -> httpx2.Response:
    messages = [{"role": "user", "content": "Say hello."}]
    return post(server, CHAT, {"messages": messages, "max_tokens": tokens, "temperature": 0, **more})


def recipe_prompt(b64: str) -> str:
    """What the picture itself says that it was made from."""
    picture = Image.open(io.BytesIO(base64.b64decode(b64)))
    return next(json.loads(text)["prompt"] for text in picture.text.values() if '"prompt"' in text)


def test_both_models_are_listed_and_each_can_be_asked_for_by_name(both: Server) -> None:
    listed = both.get("/v1/models").json()["data"]
    assert [(model["id"], model["task"]) for model in listed] == [
        ("emoji-image", "text-to-image"),
        ("smollm2", "text-generation"),
    ]
    text = both.get("/v1/models/smollm2").json()
    assert text["limits"]["max_context"] > 1000
    assert text["memory"]["kv_bytes"] <= 128 << 20
    assert both.get("/v1/models/emoji-image").json()["id"] == "emoji-image"
    assert_error(both.get("/v1/models/nothing"), 404, "model_not_found", "model")
    assert chat(both, model="smollm2").status_code == 200
    assert both.post({**QUICK, "model": "emoji-image"}).status_code == 200


def test_who_asks_the_wrong_model_is_told_where_to_go(both: Server) -> None:
    message = assert_error(both.post({**QUICK, "model": "smollm2"}), 400, "unsupported_endpoint", "model")
    assert CHAT in message
    message = assert_error(chat(both, model="emoji-image"), 400, "unsupported_endpoint", "model")
    assert "/v1/images/generations" in message


def test_chats_and_pictures_at_the_same_time_are_all_answered(both: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        chats = [pool.submit(chat, both, 24, ignore_eos=True) for _ in range(5)]
        pictures = [pool.submit(both.post, {**QUICK, "seed": seed, "num_inference_steps": 4}) for seed in range(3)]
        texts = [answer.result().json()["choices"][0]["message"]["content"] for answer in chats]
        made = [answer.result().json()["data"][0]["b64_json"] for answer in pictures]
    # In bfloat16 company decides about rounding, and rounding about ties; tests/parity/test_text.py has float32.
    assert len({text[:8] for text in texts}) == 1, texts
    assert min(map(len, texts)) > 24, texts
    assert len(set(made)) == 3
    alone = both.post({**QUICK, "seed": 1, "num_inference_steps": 4}).json()["data"][0]["b64_json"]
    assert Image.open(io.BytesIO(base64.b64decode(alone))).size == (64, 64)


def test_a_prompt_is_rewritten_and_the_answer_says_so(both: Server) -> None:
    wish = {**QUICK, "prompt": "a rocket", "enhance_prompt": True, "seed": 3, "n": 2}
    before = both.metric('mmgen_enhanced_prompts_total{outcome="ok"}')
    answer = both.post(wish).json()
    first, second = answer["data"]
    assert first["revised_prompt"] == second["revised_prompt"]
    assert len(first["revised_prompt"]) > len("a rocket")
    assert "warnings" not in answer
    assert recipe_prompt(first["b64_json"]) == first["revised_prompt"]
    assert both.metric('mmgen_enhanced_prompts_total{outcome="ok"}') == before + 1
    cached = both.metric("mmgen_text_cached_tokens_total")
    again = both.post(wish).json()
    assert again["data"][0]["revised_prompt"] == first["revised_prompt"], "the same seed, the same words"
    assert both.metric("mmgen_text_cached_tokens_total") > cached + 100, "the instructions are read once"


def test_a_stream_of_pictures_carries_the_new_prompt(both: Server) -> None:
    client = openai.OpenAI(base_url=both.base_url + "/v1", api_key="none")
    events = client.images.generate(
        prompt="a cat", size="64x64", stream=True, extra_body={"enhance_prompt": True, "num_inference_steps": 2}
    )
    (completed,) = [event for event in events if event.type == "image_generation.completed"]
    assert len(completed.model_dump()["revised_prompt"]) > 5


def test_a_client_that_leaves_while_its_prompt_is_rewritten_frees_the_engine(both: Server) -> None:
    body = {**QUICK, "prompt": "a rocket", "enhance_prompt": True}
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(both.base_url + "/v1/images/generations", json=body, timeout=0.3)
    wait_for(lambda: both.metric("mmgen_text_running") == both.metric("mmgen_running") == 0, 10, "the end of both")


def test_a_request_can_be_given_up_while_its_prompt_is_rewritten(both: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        headers = {"x-request-id": "give-me-up"}
        asked = pool.submit(both.post, {**QUICK, "prompt": "a rocket", "enhance_prompt": True}, headers)
        wait_for(lambda: both.delete("give-me-up").status_code == 200, 20, "something to give up")
        assert_error(asked.result(), 499, "cancelled")
    wait_for(lambda: both.metric("mmgen_text_running") == 0, 10, "the end of the text")


def test_a_deadline_covers_the_rewriting_too(both: Server) -> None:
    answer = both.post({**QUICK, "enhance_prompt": True, "deadline_s": 0.01})
    assert_error(answer, 504, "deadline_exceeded")


def test_a_language_model_that_takes_too_long_leaves_the_prompt_as_it_was() -> None:
    with start_server("--model-path", "emoji-image", *SMALL, "--enhance-timeout-s", "0.001") as server:
        answer = server.post({**QUICK, "prompt": "a rocket", "enhance_prompt": True})
        assert answer.status_code == 200, answer.text[:300]
        body = answer.json()
        assert "revised_prompt" not in body["data"][0]
        assert recipe_prompt(body["data"][0]["b64_json"]) == "a rocket"
        (warning,) = body["warnings"]
        assert "0.001 s" in warning
        assert server.metric('mmgen_enhanced_prompts_total{outcome="failed"}') == 1
        # Both sides sleep and wake as one.
        for path in ("/v1/sleep", "/v1/wake"):
            assert post(server, path, {}).status_code == 200
            if path == "/v1/sleep":
                assert_error(chat(server), 503, "asleep")
        assert chat(server).status_code == 200


def test_a_videos_prompt_is_rewritten_before_its_job_is_made(t2v_folder: Path, tmp_path: Path) -> None:
    flags = ("--model-path", str(t2v_folder), "--data-dir", str(tmp_path), *SMALL, "--enhance-timeout-s", "100")
    with start_server(*flags) as server:
        wish = {"prompt": "a boat", "num_frames": 1, "num_inference_steps": 1, "size": "64x64", "seed": 4}
        form = {name: (None, str(value)) for name, value in {**wish, "enhance_prompt": "true"}.items()}
        job = server.client.post(server.base_url + "/v1/videos", files=form).json()
        assert job["prompt"] == "a boat", job
        assert len(job["revised_prompt"]) > len("a boat")
        assert "warnings" not in job
        path = f"/v1/videos/{job['id']}"
        wait_for(lambda: server.get(path).json()["status"] == "completed", 60, "the video")
        assert server.get(path).json()["revised_prompt"] == job["revised_prompt"]


def test_without_a_language_model_a_prompt_cannot_be_rewritten(server: Server) -> None:
    message = assert_error(
        server.post({**QUICK, "enhance_prompt": True}), 400, "unsupported_parameter", "enhance_prompt"
    )
    assert "--llm-path" in message
    assert server.post({**QUICK, "enhance_prompt": False}).status_code == 200


def test_a_server_of_text_alone_makes_no_pictures(text_server: Server) -> None:
    listed = [model["id"] for model in text_server.get("/v1/models").json()["data"]]
    assert {name.partition(":")[0] for name in listed} == {"smollm2"}, "the model, and adapters that others loaded"
    for answer in (
        text_server.post(QUICK),
        post(text_server, "/v1/videos", {"prompt": "a boat"}),
        post(text_server, "/v1/set_lora", {"lora_nickname": "a", "lora_path": "a"}),
    ):
        message = assert_error(answer, 400, "unsupported_endpoint")
        assert re.search("no pictures|--model-path", message), message
    assert text_server.get("/health/ready").json() == {"status": "ready"}
    assert text_server.metric("mmgen_ready") == 1


def test_a_chat_in_the_middle_of_a_long_picture_is_not_kept_waiting(both: Server) -> None:
    """A first token comes within a few denoising steps, however many there are."""
    done = threading.Event()

    def paint() -> None:
        both.post({**QUICK, "size": "128x128", "num_inference_steps": 400})
        done.set()

    painting = threading.Thread(target=paint)
    painting.start()
    wait_for(lambda: both.metric("mmgen_running") == 1, 10, "the picture's first step")
    assert chat(both, 8).status_code == 200
    early = not done.is_set()
    painting.join()
    assert early, "the chat was answered while the picture was being made"
