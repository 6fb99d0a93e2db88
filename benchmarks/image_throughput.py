"""Eight mixed requests at once through HTTP, against diffusers running the same eight one after another.

The requests differ in size (96 to 160 pixels), steps (10 to 24), guidance (0 and 3) and prompt; the model is the
bundled emoji-image. Each round runs: ours with eight connections at once, diffusers one after another in a process of
its own, ours one after another through HTTP, and ours at once with --deterministic. Every round has its own prompts.
Before timing, both sides must make the same eight pictures. Then the cost of HTTP itself: wall time of one-step 32 x 32
requests less what the engine took. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from _common import Numbers, Side, figure, finish, interleave, parser, ratio, record, rounded, same_picture, say, spread
from _models import prompt
from _server import Client, Reply, Server

MIX = (
    # width, height, steps, guidance
    (128, 128, 20, 3.0),
    (96, 96, 10, 0.0),
    (160, 96, 24, 3.0),
    (128, 128, 12, 0.0),
    (96, 160, 16, 3.0),
    (160, 160, 18, 0.0),
    (112, 144, 22, 3.0),
    (144, 128, 14, 3.0),
)


def main() -> None:
    """Run what the flags choose."""
    flags = _flags()
    environment = record(flags.threads)
    with ExitStack() as stack:
        start = ("--threads", str(flags.threads), "--dtype", flags.dtype)
        server = stack.enter_context(Server(*start))
        theirs = stack.enter_context(
            Side(
                kind="diffusers",
                model="emoji-image",
                dtype=server.dtype,
                threads=flags.threads,
                calm=flags.tune_peer,
                keep_freed=flags.tune_peer,
            )
        )
        agreement = check(server, theirs, mix(0, flags.steps))
        say(f"same pictures in {server.dtype}: {agreement}")
        sides: dict[str, Callable[[int], float]] = {
            "concurrent": lambda i: at_once(server, mix(i + 1, flags.steps))[0],
            "diffusers": lambda i: in_turn_diffusers(theirs, mix(i + 1, flags.steps)),
            # Prompts of its own: those of the concurrent run are in the conditions cache.
            "sequential": lambda i: in_turn(server, mix(i + 1 + flags.repeats, flags.steps)),
        }
        if not flags.skip_deterministic:
            strict = stack.enter_context(Server(*start, "--deterministic"))
            at_once(strict, mix(0, flags.steps))
            sides["deterministic"] = lambda i: at_once(strict, mix(i + 1, flags.steps))[0]
        took = interleave(sides, flags.repeats, flags.max_seconds)
        results = {"dtype": server.dtype, "diffusers_tuned": flags.tune_peer, "agreement": agreement, **report(took)}
        results["http_overhead_ms"] = overhead(server, flags.overhead_requests)
    finish("image_throughput", environment, results)


def _flags() -> argparse.Namespace:
    made = parser(__doc__ or "", repeats=7, max_seconds=900)
    made.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: what we would use"
    )
    made.add_argument("--steps", type=int, help="steps of all requests, for a quick try; default: 10 to 24")
    made.add_argument("--overhead-requests", type=int, default=100, help="default %(default)s; plus 10 to warm up")
    made.add_argument("--skip-deterministic", action="store_true", help="leave out the second server")
    made.add_argument("--tune-peer", action="store_true", help="give diffusers our allocator and OpenMP settings too")
    return made.parse_args()


def mix(number: int, steps: int | None) -> list[dict[str, Any]]:
    """The eight requests of one round, in the words of `_side.Request`."""
    return [
        {
            "prompt": prompt(number * len(MIX) + i),
            "seed": number * len(MIX) + i,
            "width": width,
            "height": height,
            "steps": steps or usual,
            "guidance": guidance,
        }
        for i, (width, height, usual, guidance) in enumerate(MIX)
    ]


def at_once(server: Server, requests: list[dict[str, Any]]) -> tuple[float, list[Reply]]:
    """All requests at the same time; seconds until the last is answered."""
    with ThreadPoolExecutor(len(requests)) as pool:
        begin = time.perf_counter()
        replies = list(pool.map(lambda request: _send(server, request), requests))
        return time.perf_counter() - begin, replies


def in_turn(server: Server, requests: list[dict[str, Any]]) -> float:
    """One request after another through HTTP; seconds for all."""
    begin = time.perf_counter()
    for request in requests:
        _send(server, request)
    return time.perf_counter() - begin


def in_turn_diffusers(theirs: Side, requests: list[dict[str, Any]]) -> float:
    """One request after another in diffusers; seconds for all, as its process counts them."""
    return sum(float(theirs.run(**request)["seconds"]) for request in requests)


def _send(server: Server, request: dict[str, Any]) -> Reply:
    with closing(Client(server.port)) as client:
        return client.generate(body(request))


def body(request: dict[str, Any]) -> dict[str, Any]:
    """A request of ours in the words of the HTTP API."""
    return {
        "prompt": request["prompt"],
        "seed": request["seed"],
        "size": f"{request['width']}x{request['height']}",
        "num_inference_steps": request["steps"],
        "guidance_scale": request["guidance"],
    }


def check(server: Server, theirs: Side, requests: list[dict[str, Any]]) -> Numbers:
    """The untimed first round of both sides, whose pictures must agree. Returns the worst agreement."""
    worst: Numbers = {"max_difference": -1}
    replies = at_once(server, requests)[1]
    with tempfile.TemporaryDirectory(prefix="mmgen-bench-") as folder:
        path = str(Path(folder, "theirs.npy"))
        for request, reply in zip(requests, replies, strict=True):
            theirs.run(save=path, **request)
            found = same_picture(reply.picture, np.load(path), server.dtype)
            worst = max(worst, found, key=lambda numbers: numbers["max_difference"])
    return worst


def report(took: dict[str, list[float]]) -> Numbers:
    """Seconds for eight requests, requests per second, ratios."""
    pairs = {
        "concurrent_over_diffusers": ("diffusers", "concurrent"),
        "sequential_over_diffusers": ("diffusers", "sequential"),
        "concurrent_over_sequential": ("sequential", "concurrent"),
        "cost_of_deterministic": ("deterministic", "concurrent"),
    }
    return {
        "requests": len(MIX),
        "seconds": {name: spread(values) for name, values in took.items()},
        "requests_per_s": {name: rounded(len(MIX) / spread(values)["median"]) for name, values in took.items()},
        **{name: ratio(took[slow], took[fast]) for name, (slow, fast) in pairs.items() if slow in took},
        "figures": [
            figure(
                "eight mixed requests at once over HTTP",
                {"ours": took["concurrent"], "diffusers": took["diffusers"]},
                {"diffusers": 4.0},
            ),
            figure("eight, one after another", {"ours": took["sequential"], "diffusers": took["diffusers"]}),
        ],
    }


def overhead(server: Server, count: int) -> Numbers:
    """Milliseconds that HTTP, both process borders and the PNG add to a request on a kept-alive connection."""
    with closing(Client(server.port)) as client:
        replies = [
            client.generate(
                {"prompt": "red heart", "seed": i, "size": "32x32", "num_inference_steps": 1, "guidance_scale": 0.0}
            )
            for i in range(count + 10)
        ]
    return spread([(reply.wall_s - reply.total_s) * 1e3 for reply in replies[10:]])


if __name__ == "__main__":
    main()
