"""Giving up: a disconnect or a DELETE frees the machine within a step, and a reader who does not read is cut off."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx2
import openai
import pytest

from tests.support.server import QUICK, Server, assert_error, http, start_server, wait_for

pytestmark = [pytest.mark.api]

PATH = "/v1/images/generations"
LONG = {**QUICK, "num_inference_steps": 900}


def idle(server: Server) -> bool:
    """The worker has let go of every request."""
    return server.metric("mmgen_queue_cost") == 0


def running(server: Server) -> bool:
    return server.metric("mmgen_running") > 0


def send(server: Server, body: dict[str, object], **headers: str) -> socket.socket:
    """A connection on which a request has been sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(http("POST", PATH, json.dumps(body).encode(), **headers))
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_machine(server: Server, stream: bool) -> None:
    connection = send(server, {**LONG, "stream": stream})
    wait_for(lambda: running(server), 20, "the start")
    cancelled = server.metric("mmgen_cancelled_total")
    connection.close()
    assert wait_for(lambda: idle(server), 5, "the cancellation") < 2
    assert server.metric("mmgen_cancelled_total") == cancelled + 1


def test_delete_cancels_by_request_id(server: Server) -> None:
    answers: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: answers.append(server.post(LONG, {"x-request-id": "to-cancel"})))
    thread.start()
    wait_for(lambda: running(server), 20, "the start")
    deleted = server.delete("to-cancel")
    assert deleted.status_code == 200
    assert deleted.json() == {"id": "to-cancel", "object": "image.generation.cancelled", "cancelled": True}
    thread.join(5)
    assert not thread.is_alive()
    assert_error(answers[0], 499, "cancelled")
    assert answers[0].headers["x-should-retry"] == "false"
    assert_error(server.delete("to-cancel"), 404, "not_found")


def test_delete_ends_a_stream_with_an_error_event(server: Server) -> None:
    client = openai.OpenAI(base_url=server.base_url + "/v1", api_key="none", max_retries=0)
    stream = client.images.generate(
        prompt="a cat",
        size="64x64",
        stream=True,
        partial_images=3,
        extra_body={"num_inference_steps": 200},
        extra_headers={"x-request-id": "stream-1"},
    )
    next(stream)
    server.delete("stream-1")
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "cancelled"
    wait_for(lambda: idle(server), 5, "the cancellation")


def test_one_request_id_may_name_several_requests(server: Server) -> None:
    connections = [send(server, LONG, x_request_id="same") for _ in range(3)]
    wait_for(lambda: server.metric("mmgen_running") == 3, 20, "the start")
    assert server.delete("same").status_code == 200
    wait_for(lambda: idle(server), 5, "the cancellation")
    for connection in connections:
        assert b"499" in connection.recv(20)
        connection.close()


def test_hundreds_of_disconnects(server: Server) -> None:
    """Abuse item 50."""
    files = open_files(server)
    for round_ in range(10):
        connections = [send(server, {**LONG, "seed": i, "stream": bool(i % 2)}) for i in range(30)]
        time.sleep(0.05 * (round_ % 3))
        for connection in connections:
            connection.close()
    wait_for(lambda: idle(server), 20, "the cancellation")
    wait_for(lambda: open_files(server) <= files + 2, 10, "closing of all connections")


def open_files(server: Server) -> int:
    import psutil

    return int(psutil.Process(server.process.pid).num_fds())


def test_a_queued_request_can_be_cancelled_too(server: Server) -> None:
    first = send(server, {**LONG, "size": "512x512", "n": 4, "num_inference_steps": 500})
    second = send(server, LONG, x_request_id="queued")
    wait_for(lambda: server.delete("queued").status_code == 200, 10, "the cancellation")
    assert b"499" in second.recv(20)
    first.close()
    second.close()
    wait_for(lambda: idle(server), 10, "the cancellation")


@pytest.fixture(scope="module")
def hasty() -> Iterator[Server]:
    """A server that waits one second for a reader."""
    with start_server("--body-timeout-s", "1") as server:
        yield server


def test_a_stream_that_nobody_reads_is_closed(hasty: Server) -> None:
    """Abuse item 51."""
    before = hasty.rss()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", hasty.port))
    body = {**QUICK, "n": 10, "size": "192x192", "num_inference_steps": 4, "stream": True, "partial_images": 3}
    connection.sendall(http("POST", PATH, json.dumps(body).encode()))
    wait_for(lambda: hasty.metric("mmgen_cancelled_total") == 1, 60, "closing the stream")
    wait_for(lambda: idle(hasty), 10, "the cancellation")
    assert hasty.rss() - before < 60 * 2**20
    connection.close()
    assert hasty.post(QUICK).status_code == 200
