"""One server for most tests; tests that break, fill or restrict a server start their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.support.server import QUICK, ROOT, Server, start_server


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model with default settings, without a key; the example adapters can be loaded."""
    root = shutil.copytree(ROOT / "examples" / "loras", tmp_path_factory.mktemp("adapters") / "loras")
    with start_server("--lora-root", str(root)) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The shared server; whatever a test does to it, its worker lives on and the next good request succeeds."""
    before = shared_server.worker_pid()
    yield shared_server
    assert shared_server.worker_pid() == before
    response = shared_server.post({**QUICK, "num_inference_steps": 1})
    assert response.status_code == 200, response.text[:500]
