"""How soon a server answers: from the start of `mmgen serve` to its first byte, readiness and first picture.

Beside it, the same picture from the start of a Python that runs diffusers: imports, loading, one picture, no server.
The server's second picture alone says what of the first was starting. The last line of stdout is JSON.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from contextlib import suppress

from _common import ROOT, Numbers, environment, figure, finish, interleave, parser, record, spread
from _models import prompt

SIZE = 128
STEPS = 20
GOAL_FIRST_BYTE_S = 4.0
LIMIT_S = 120.0
# What a user of diffusers writes, with the imports inside of the time.
DIFFUSERS = """
import sys, torch
from diffusers import ZImagePipeline
torch.set_num_threads(int(sys.argv[3]))
pipe = ZImagePipeline.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
pipe.set_progress_bar_config(disable=True)
side, steps = int(sys.argv[5]), int(sys.argv[6])
pipe(sys.argv[4], width=side, height=side, num_inference_steps=steps, guidance_scale=3.0,
     generator=torch.Generator("cpu").manual_seed(0)).images[0]
print("picture", flush=True)
sys.stdin.read()
"""


def main() -> None:
    """Run what the flags choose."""
    made = parser(__doc__ or "", repeats=5, max_seconds=300)
    made.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="default: %(default)s")
    made.add_argument("--skip-peer", action="store_true", help="leave out diffusers")
    flags = made.parse_args()
    about = record(flags.threads)
    sides = {"ours": lambda number: serve(number, flags.threads, flags.dtype)}
    if not flags.skip_peer:
        sides["diffusers"] = lambda number: diffusers(number, flags.threads, flags.dtype)
    for run in sides.values():  # files come into the page cache
        run(0)
    took = interleave(
        {name: (lambda i, run=run: run(i + 1)) for name, run in sides.items()}, flags.repeats, flags.max_seconds
    )
    moments = {name: [answer[name] for answer in took["ours"]] for name in took["ours"][0]}
    results: Numbers = {
        "dtype": flags.dtype,
        "seconds": {name: spread(values) for name, values in moments.items()},
        "first_byte_goal_s": GOAL_FIRST_BYTE_S,
        "first_byte_met": max(moments["first_byte"]) <= GOAL_FIRST_BYTE_S,
        "figures": [],
    }
    if "diffusers" in took:
        pair = {
            "ours": moments["first_picture"],
            "diffusers": [answer["first_picture"] for answer in took["diffusers"]],
        }
        results["figures"] = [figure("start to first picture, emoji-image (ours over HTTP)", pair)]
    finish("startup", about, results)


def serve(number: int, threads: int, dtype: str) -> Numbers:
    """Start a server, have it make two pictures, end it; seconds from the start, and of the second picture alone."""
    port = _free_port()
    flags = ("--port", str(port), "--device", "cpu", "--threads", str(threads), "--dtype", dtype)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "multimodal_gen.cli.main", "serve", *flags],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        connection = _connect(port, process)
        found = {"first_byte": time.perf_counter() - began}
        while _ask(connection, "GET", "/health/ready") != 200:
            time.sleep(0.01)
        found["ready"] = time.perf_counter() - began
        _picture(connection, 2 * number)
        found["first_picture"] = time.perf_counter() - began
        _picture(connection, 2 * number + 1)
        found["second_picture_alone"] = time.perf_counter() - began - found["first_picture"]
    finally:
        process.terminate()
        process.wait(LIMIT_S)
    return found


def diffusers(number: int, threads: int, dtype: str) -> Numbers:
    """The same picture from a Python that starts now."""
    model = ROOT / "multimodal_gen" / "assets" / "emoji-image"
    words = (str(model), dtype, str(threads), prompt(2 * number), str(SIZE), str(STEPS))
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", DIFFUSERS, *words],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        took = time.perf_counter() - began
        if line != "picture\n":
            raise SystemExit("diffusers made no picture")
    return {"first_picture": took}


def _connect(port: int, process: subprocess.Popen[bytes]) -> http.client.HTTPConnection:
    """A connection on which one answer has been read."""
    while process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
        with suppress(OSError):
            _ask(connection, "GET", "/health")
            return connection
        time.sleep(0.005)
    raise SystemExit(f"the server ended with code {process.returncode}")


def _picture(connection: http.client.HTTPConnection, number: int) -> None:
    body = {
        "prompt": prompt(number),
        "seed": 0,
        "size": f"{SIZE}x{SIZE}",
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
    }
    status = _ask(connection, "POST", "/v1/images/generations", json.dumps(body).encode())
    if status != 200:
        raise SystemExit(f"the server answered {status}")


def _ask(connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None) -> int:
    connection.request(method, path, body, {} if body is None else {"content-type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


if __name__ == "__main__":
    main()
