"""The worker fails, crashes or is full: every request is answered exactly once, and the server goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import openai
import pytest

from tests.support.server import QUICK, Server, assert_error, start_server, wait_for

pytestmark = [pytest.mark.api, pytest.mark.slow]

LONG = {**QUICK, "num_inference_steps": 900}


@contextmanager
def asking(server: Server, *bodies: dict[str, object]) -> Iterator[list[Future[httpx2.Response]]]:
    """Requests under way."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        yield [pool.submit(server.post, body) for body in bodies]


def ready_again(server: Server) -> bool:
    return server.get("/health/ready").status_code == 200


def test_a_failed_request_says_so_and_the_next_succeeds() -> None:
    with start_server(fault="denoise:raise:1") as server:
        pid = server.worker_pid()
        response = server.post(QUICK)
        assert_error(response, 500, "generation_failed")
        assert response.headers["x-should-retry"] == "false"
        assert "retry-after" not in response.headers
        assert server.post(QUICK).status_code == 200
        assert server.worker_pid() == pid


def test_out_of_memory_is_not_sent_again_by_the_client() -> None:
    with start_server(fault="decode:oom:2") as server:
        client = openai.OpenAI(base_url=server.base_url + "/v1", api_key="none", max_retries=2)
        with pytest.raises(openai.InternalServerError) as caught:
            client.images.generate(prompt="a cat", size="64x64", extra_body={"num_inference_steps": 1})
        assert (caught.value.status_code, caught.value.code) == (503, "out_of_memory")
        # Answered once: a resend would count as a second error.
        error = 'mmgen_requests_total{endpoint="/v1/images/generations",model="emoji-image",outcome="error"}'
        assert server.metric(error) == 1
        wait_for(lambda: server.post(QUICK).status_code == 200, 10, "recovery")


def test_crash_fails_what_runs_and_keeps_what_waits() -> None:
    with start_server("--max-batch-tokens", "100") as server:
        pid = server.worker_pid()
        with asking(server, LONG) as (first,):
            wait_for(lambda: server.metric("mmgen_running") >= 1, 20, "the start")
            os.kill(pid, signal.SIGSTOP)  # or it starts them at once
            with asking(server, QUICK, {**QUICK, "seed": 2}) as waiting:
                wait_for(lambda: server.metric("mmgen_queue_depth") == 2, 20, "queueing")
                started = time.monotonic()
                os.kill(pid, signal.SIGKILL)
                response = first.result(10)
                assert time.monotonic() - started < 2
                assert_error(response, 500, "worker_crashed")
                assert response.headers["x-should-retry"] == "false"
                assert server.get("/health/live").status_code == 200
                for future in waiting:
                    assert future.result(60).status_code == 200
        assert server.worker_pid() != pid
        assert server.metric("mmgen_worker_restarts_total") == 1


@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_crash_during_a_stream_arrives_as_an_error_event(stage: str) -> None:
    with start_server(fault=f"{stage}:kill:1") as server:
        client = openai.OpenAI(base_url=server.base_url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError) as caught:
            list(client.images.generate(prompt="a cat", size="64x64", stream=True))
        assert caught.value.code == "worker_crashed"
        # While the worker restarts, health says so and new requests wait.
        health = server.get("/health/ready")
        assert (health.status_code, health.json()["status"]) == (503, "restarting")
        assert health.json()["error"]["code"] == "model_loading"
        assert server.post(QUICK).status_code == 200
        assert ready_again(server)


def test_a_waiting_request_can_be_cancelled_while_the_worker_restarts() -> None:
    with start_server(fault="decode:kill:1") as server:
        assert server.post(QUICK).status_code == 500
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.post, LONG, {"x-request-id": "patient"})
            wait_for(lambda: server.metric("mmgen_queue_depth") == 1, 20, "queueing")
            assert server.delete("patient").status_code == 200
            assert_error(waiting.result(20), 499, "cancelled")


def test_queue_flood() -> None:
    """Abuse item 52: ten times the capacity at once."""
    with start_server("--max-queue-cost", "40000") as server:
        body = {**QUICK, "num_inference_steps": 40, "guidance_scale": 0}
        before, answers, times = server.rss(), list[httpx2.Response](), list[float]()

        def ask() -> None:
            started = time.monotonic()
            answers.append(server.post(body))
            times.append(time.monotonic() - started)

        threads = [threading.Thread(target=ask) for _ in range(120)]
        for thread in threads:
            thread.start()
        live = [server.get("/health/live").status_code for _ in range(20)]
        for thread in threads:
            thread.join(120)
        assert live == [200] * 20
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 60 < len(refused) < 120
        for answer in refused:
            assert_error(answer, 429, "queue_full")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert "x-should-retry" not in answer.headers
        assert server.metric('mmgen_rejected_total{reason="queue_full"}') == len(refused)
        assert server.rss() - before < 50 * 2**20
        assert server.post(QUICK).status_code == 200
