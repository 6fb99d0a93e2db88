"""A real `mmgen serve` process and the smallest client for it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from _common import ROOT, environment
from PIL import Image

START_S = 120.0


@dataclass(frozen=True)
class Reply:
    """One answered request."""

    wall_s: float
    """from sending to the last byte read"""
    total_s: float
    """`timings.total` of the answer: what the engine took"""
    picture: np.ndarray
    """uint8 [H, W, 3]"""


class Client:
    """One kept-alive connection; for one thread."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def generate(self, body: dict[str, Any]) -> Reply:
        """POST one image request. Raises: RuntimeError with the server's words."""
        data = json.dumps(body).encode()
        begin = time.perf_counter()
        self._connection.request("POST", "/v1/images/generations", data, {"content-type": "application/json"})
        response = self._connection.getresponse()
        answer = response.read()
        wall = time.perf_counter() - begin
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {answer[:500]!r}")
        found = json.loads(answer)
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["data"][0]["b64_json"]))).convert("RGB"))
        return Reply(wall, found["timings"]["total"], picture)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class Server:
    """`mmgen serve --port 0 FLAGS`, loaded and listening until the block ends."""

    def __init__(self, *flags: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mmgen-bench-")
        self._log = Path(self._folder.name, "log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "multimodal_gen.cli.main", "serve", "--port", "0", "--device", "cpu", *flags],
                cwd=ROOT,
                env=environment(PYTHONUNBUFFERED="1"),
                stdout=log,
                stderr=log,
            )
        try:
            self.port, self.dtype = self._await_ready()
        except BaseException:
            self._stop()
            raise

    def _await_ready(self) -> tuple[int, str]:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            log = self._log.read_text()
            found = re.search(r"Ready at http://\S+:(\d+): .*? on \S+ in (\w+)", log)
            if found:
                return int(found[1]), found[2]
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended with {self._process.returncode}:\n{log}")
            time.sleep(0.05)
        raise SystemExit(f"the server was not ready after {START_S:g} s:\n{self._log.read_text()}")

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
