"""One server for most tests; tests that break, fill or restrict a server start their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.server import QUICK, Server, start_server


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    """The bundled model with default settings, without a key."""
    with start_server() as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The shared server; whatever a test does to it, its worker lives on and the next good request succeeds."""
    before = shared_server.worker_pid()
    yield shared_server
    assert shared_server.worker_pid() == before
    response = shared_server.post({**QUICK, "num_inference_steps": 1})
    assert response.status_code == 200, response.text[:500]
