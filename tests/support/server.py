"""A real server process for tests: `mmgen serve` on a free port, its worker, and raw sockets to send it anything."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.support.device import DEVICE

ROOT = Path(__file__).parents[2]
START_S = 90.0
STOP_S = 30.0
# The smallest and fastest picture worth making.
QUICK: dict[str, Any] = {"prompt": "a red apple", "size": "64x64", "num_inference_steps": 2, "seed": 1}


@dataclass
class Server:
    """A running `mmgen serve`."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path
    api_key: str | None = None
    base_url: str = ""
    client: httpx2.Client = field(default_factory=lambda: httpx2.Client(timeout=120.0))

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.base_url.rpartition(":")[2])

    @property
    def headers(self) -> dict[str, str]:
        """What an authorised client sends."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def log(self) -> str:
        """Everything it said so far."""
        return self.stdout.read_text() + self.stderr.read_text()

    def logged(self, text: str, *, timeout_s: float = 10.0) -> bool:
        """Whether it says `text`, now or soon: a request's line is written after its answer was sent."""
        end = time.monotonic() + timeout_s
        while text not in self.log:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def worker_pids(self) -> list[int]:
        """The process ids of all ranks, in the order in which they were started."""
        return [
            child.pid
            for child in psutil.Process(self.process.pid).children()
            if child.status() != psutil.STATUS_ZOMBIE and any("engine.worker" in part for part in child.cmdline())
        ]

    def worker_pid(self) -> int:
        """The process id of the one worker."""
        (worker,) = self.worker_pids()
        return worker

    def rss(self) -> int:
        """Resident bytes of the front process."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        """GET with the key."""
        return self.client.get(self.base_url + path, headers={**self.headers, **headers})

    def post(self, body: object, headers: dict[str, str] | None = None) -> httpx2.Response:
        """POST an image request: a dict goes as JSON, bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(
            self.base_url + "/v1/images/generations",
            content=content,
            headers={"content-type": "application/json", **self.headers, **(headers or {})},
        )

    def delete(self, request_id: str) -> httpx2.Response:
        """Cancel a request."""
        return self.client.delete(f"{self.base_url}/v1/images/generations/{request_id}", headers=self.headers)

    def metric(self, name: str) -> float:
        """One sample of /metrics, by its full name with labels."""
        lines = self.get("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name), 0.0)

    def exchange(self, data: bytes, *, timeout_s: float = 60.0) -> RawAnswer:
        """Send raw bytes on a new connection and read one whole answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            connection.sendall(data)
            return read_answer(connection)

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the front process alone."""
        self.process.send_signal(number)


@dataclass
class RawAnswer:
    """An HTTP answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> dict[str, Any]:
        """The error object."""
        error = json.loads(self.body)["error"]
        assert isinstance(error, dict)
        return error


def read_answer(connection: socket.socket) -> RawAnswer:
    """Read one answer with a content-length; status 0 when the server closed without a word."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return RawAnswer(0, {}, data)
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", "0")):
        part = connection.recv(65536)
        if not part:
            break
        body += part
    return RawAnswer(int(status.split()[1]), headers, body)


def http(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """The bytes of a request; underscores in header names become hyphens; a header of "" is left out."""
    given = {
        "host": "127.0.0.1",
        "content-type": "application/json" if body else "",
        "content-length": str(len(body)) if body else "",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def assert_error(response: httpx2.Response | RawAnswer, status: int, code: str, param: str | None = None) -> str:
    """Check an answer for OpenAI's error shape with a request id and nothing internal; returns the message."""
    text = response.text if isinstance(response, httpx2.Response) else response.body.decode()
    seen = response.status_code if isinstance(response, httpx2.Response) else response.status
    assert seen == status, (seen, text[:500])
    body = json.loads(text)
    assert set(body) == {"error"}, text[:500]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert (error["code"], error["param"]) == (code, param), error
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", response.headers["x-request-id"])
    assert len(text) < 2000
    for leak in ("Traceback", str(ROOT), "site-packages", " at 0x", ".py"):
        assert leak not in text, leak
    message = error["message"]
    assert isinstance(message, str)
    assert message.isprintable()
    return message


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Poll until the condition holds; returns the seconds that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.01)
    return time.monotonic() - started


def environment(**extra: str) -> dict[str, str]:
    """The environment of a server under test: one thread, no settings of the developer's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MMGEN_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


@contextmanager
def start_server(
    *flags: str, api_key: str | None = None, fault: str | None = None, ready: bool = True
) -> Iterator[Server]:
    """Run `mmgen serve --port 0 FLAGS`; it has stopped when the block ends. `ready` waits for the model."""
    extra = {name: value for name, value in (("MMGEN_API_KEY", api_key), ("MMGEN_FAULT", fault)) if value is not None}
    command = [sys.executable, "-m", "multimodal_gen.cli.main", "serve", "--port", "0", "--device", DEVICE, *flags]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(command, cwd=ROOT, env=environment(**extra), stdout=stdout, stderr=stderr)
        server = Server(process, out, err, api_key)
        try:
            _await(server, r"Ready at (http://\S+?):? " if ready else r"Listening at (http://\S+?),? ")
            yield server
        finally:
            server.client.close()
            stop(process)


def _await(server: Server, pattern: str) -> None:
    wait_for(
        lambda: re.search(pattern, server.log) is not None or server.process.poll() is not None, START_S, "the start"
    )
    found = re.search(pattern, server.log)
    assert found, f"the server ended with {server.process.poll()}:\n{server.log}"
    server.base_url = found[1].rstrip(":,")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its worker, gently first."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    for child in alive:
        child.kill()
    assert not alive, "the worker outlived the server"


def run_server(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `mmgen serve FLAGS` that is expected to refuse to start."""
    command = [sys.executable, "-m", "multimodal_gen.cli.main", "serve", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=60, check=False
    )
