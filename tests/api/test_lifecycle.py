"""Start and end of a server: refusals, readiness while loading, draining."""

from __future__ import annotations

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.support.server import QUICK, Server, assert_error, run_server, start_server, wait_for

pytestmark = [pytest.mark.api]


def seconds_of_work(steps: int) -> dict[str, object]:
    """A request that `--fault denoise:slow` stretches to half a second per step."""
    return {**QUICK, "num_inference_steps": steps}


def test_public_bind_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.7", "", "example.com"):
        started = time.monotonic()
        done = run_server("--port", "0", "--host", host)
        assert done.returncode == 2, done
        assert "API key" in done.stderr
        assert "Traceback" not in done.stderr
        assert time.monotonic() - started < 10


def test_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_server("--port", str(port))
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_model() -> None:
    done = run_server("--port", "0", "--model-path", "/nonexistent/model", "--local-files-only")
    assert done.returncode == 2
    assert "/nonexistent/model" in done.stderr
    assert "Traceback" not in done.stderr


def test_loading_failure_ends_the_server() -> None:
    done = run_server("--port", "0", "--attention-backend", "nonsense", "--device", "cpu")
    assert done.returncode != 0
    assert "sdpa" in done.stderr
    assert "Traceback" not in done.stderr


def test_while_loading_health_is_honest_and_requests_are_told_to_wait() -> None:
    with start_server(fault="load:slow:6", ready=False) as server:
        assert server.get("/health/live").status_code == 200
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        response = server.post(QUICK)
        assert_error(response, 503, "model_loading")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert_error(server.post({**QUICK, "n": 0}), 400, "invalid_n", "n")
        assert server.get("/v1/models").status_code == 200
        wait_for(lambda: server.get("/health").status_code == 200, 60, "loading")
        assert "curl http://127.0.0.1:" in server.stdout.read_text()


def draining(server: Server) -> bool:
    return bool(server.get("/health").json()["status"] == "draining")


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_refuses_the_rest() -> None:
    with start_server(fault="denoise:slow:6") as server, ThreadPoolExecutor(2) as pool:
        worker = server.worker_pid()
        plain = pool.submit(server.post, seconds_of_work(6))
        stream = pool.submit(server.post, {**seconds_of_work(6), "stream": True})
        wait_for(lambda: server.metric("mmgen_running") == 2, 20, "the start")
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: draining(server), 5, "draining")
        response = server.post(QUICK)
        assert_error(response, 503, "shutting_down")
        assert "retry-after" in response.headers
        assert server.get("/health/live").status_code == 200
        assert plain.result(30).status_code == 200
        assert "image_generation.completed" in stream.result(30).text
        assert server.process.wait(15) == 0
        wait_for(lambda: not psutil.pid_exists(worker), 5, "the worker's end")


@pytest.mark.slow
def test_drain_ends_after_its_time() -> None:
    with start_server("--drain-timeout-s", "1", fault="denoise:slow:200") as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, seconds_of_work(200))
        wait_for(lambda: server.metric("mmgen_running") == 1, 20, "the start")
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        answer = running.result(30)
        assert_error(answer, 500, "generation_failed")
        assert answer.headers["x-should-retry"] == "false"  # its work had begun
        assert server.process.wait(15) == 0
        assert time.monotonic() - started < 12


@pytest.mark.slow
def test_second_signal_is_immediate() -> None:
    with start_server(fault="denoise:slow:200") as server, ThreadPoolExecutor(1) as pool:
        worker = server.worker_pid()
        running = pool.submit(server.post, seconds_of_work(200))
        wait_for(lambda: server.metric("mmgen_running") == 1, 20, "the start")
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: draining(server), 5, "draining")
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 128 + signal.SIGTERM
        assert time.monotonic() - started < 4
        wait_for(lambda: not psutil.pid_exists(worker), 5, "the worker's end")
        assert running.exception(10) is not None or running.result().status_code == 500


@pytest.mark.slow
def test_worker_does_not_outlive_a_killed_front() -> None:
    with start_server() as server:
        worker = server.worker_pid()
        server.process.kill()
        wait_for(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie", 5, "its end")
