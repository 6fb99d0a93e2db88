"""One server for most tests; tests that break, fill or restrict a server start their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import videos
from tests.support.server import QUICK, ROOT, Server, start_server
from tests.support.text_adapters import write_poet
from tests.support.text_server import QUICK_CHAT, post
from tests.support.wan_checkpoints import make_wan


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


@pytest.fixture(scope="session")
def t2v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan2.1 that makes videos from text."""
    return make_wan(tmp_path_factory.mktemp("models") / "tiny-t2v", "t2v")


@pytest.fixture(scope="session")
def i2v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan2.1 that makes videos from a picture."""
    return make_wan(tmp_path_factory.mktemp("models") / "tiny-i2v", "i2v")


@pytest.fixture(scope="session")
def shared_video_server(t2v_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny text-to-video model with default settings, without a key."""
    with start_server("--model-path", str(t2v_folder), "--data-dir", str(tmp_path_factory.mktemp("jobs"))) as server:
        yield server


@pytest.fixture
def video_server(shared_video_server: Server) -> Iterator[Server]:
    """The shared server of videos; whatever a test does to it, its worker lives on and the next video is made."""
    before = shared_video_server.worker_pid()
    yield shared_video_server
    assert shared_video_server.worker_pid() == before
    assert videos.made(shared_video_server, num_frames=1, num_inference_steps=1)


@pytest.fixture(scope="session")
def image_video_server(i2v_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny image-to-video model."""
    data = str(tmp_path_factory.mktemp("jobs"))
    with start_server("--model-path", str(i2v_folder), "--data-dir", data, "--max-picture-mb", "1") as server:
        yield server


@pytest.fixture(scope="session")
def shared_text_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SmolLM2 alone, with default settings, without a key; there is an adapter that can be loaded."""
    root = write_poet(tmp_path_factory.mktemp("text adapters"))
    with start_server("--llm-path", "smollm2", "--lora-root", str(root)) as server:
        yield server


@pytest.fixture(scope="session")
def both_server() -> Iterator[Server]:
    """The bundled model and SmolLM2 in one server. A busy machine may take its time with a prompt."""
    with start_server(
        *("--model-path", "emoji-image", "--llm-path", "smollm2", "--kv-cache-memory", "128MiB"),
        *("--enhance-timeout-s", "100"),
    ) as server:
        yield server


@pytest.fixture
def text_server(shared_text_server: Server) -> Iterator[Server]:
    """The shared server of texts; whatever a test does to it, its worker lives on and the next chat is answered."""
    before = shared_text_server.worker_pid()
    yield shared_text_server
    assert shared_text_server.worker_pid() == before
    response = post(shared_text_server, "/v1/chat/completions", {**QUICK_CHAT, "max_tokens": 1})
    assert response.status_code == 200, response.text[:500]
