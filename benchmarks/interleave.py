"""Eight chats and four pictures at once on one server, each beside what it takes alone.

The server has the bundled emoji-image and SmolLM2. Chats stream 128 tokens each, pictures are 128 x 128 with 20 steps
and guidance, every round has prompts of its own. Reported: milliseconds between a chat's tokens (p50, p99, the
longest), seconds of a picture, alone and together; nobody starves where the longest gap stays within seconds and all
finish. The last line of stdout is JSON.
"""

from __future__ import annotations

import http.client
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise

from _common import Numbers, finish, interleave, parser, record, rounded, say, spread
from _models import prompt
from _server import Client, Server

CHATS, PICTURES, TOKENS = 8, 4, 128


def main() -> None:
    """Run what the flags choose."""
    made = parser(__doc__ or "", repeats=5, max_seconds=300)
    made.add_argument("--budget-ms", type=float, default=150.0, help="--tpot-budget-ms of the server")
    flags = made.parse_args()
    environment = record(flags.threads)
    start = ("--model-path", "emoji-image", "--llm-path", "smollm2", "--threads", str(flags.threads))
    with Server(*start, "--tpot-budget-ms", str(flags.budget_ms)) as server:
        together(server, 0, CHATS, PICTURES)
        sides = {
            "chats_alone": lambda i: together(server, 3 * i + 1, CHATS, 0),
            "pictures_alone": lambda i: together(server, 3 * i + 2, 0, PICTURES),
            "together": lambda i: together(server, 3 * i + 3, CHATS, PICTURES),
        }
        rounds = interleave(sides, flags.repeats, flags.max_seconds)
    finish("interleave", environment, {name: _figures(found) for name, found in rounds.items()})


Found = tuple[list[list[float]], list[float]]  # per chat: when its tokens came; per picture: seconds


def together(server: Server, number: int, chats: int, pictures: int) -> Found:
    """All at once."""
    with ThreadPoolExecutor(CHATS + PICTURES) as pool:
        talks = [pool.submit(chat, server, f"Tell me about number {number * CHATS + at}.") for at in range(chats)]
        drawn = [pool.submit(picture, server, number * PICTURES + at) for at in range(pictures)]
        found = [talk.result() for talk in talks], [one.result() for one in drawn]
    say(f"{chats} chats and {pictures} pictures are done")
    return found


def chat(server: Server, question: str) -> list[float]:
    """Stream one answer; the times at which its tokens came."""
    body = {
        "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "temperature": 0, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    times: list[float] = []
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)) as connection:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {response.read()[:500]!r}")
        for line in response:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
    return times


def picture(server: Server, seed: int) -> float:
    """Seconds of one picture."""
    with closing(Client(server.port)) as client:
        body = {"prompt": prompt(seed), "size": "128x128", "seed": seed, "num_inference_steps": 20, "guidance_scale": 3}
        return client.generate(body).wall_s


def _figures(rounds: list[Found]) -> Numbers:
    gaps = sorted(1e3 * (b - a) for talks, _ in rounds for times in talks for a, b in pairwise(times))
    drawn = [seconds for _, pictures in rounds for seconds in pictures]
    found: Numbers = {}
    if gaps:
        tokens = [len(times) / (times[-1] - times[0]) for talks, _ in rounds for times in talks]
        found["ms_between_tokens"] = {
            "p50": rounded(statistics.median(gaps)),
            "p99": rounded(gaps[int(0.99 * (len(gaps) - 1))]),
            "longest": rounded(gaps[-1]),
        }
        found["tokens_per_s_of_a_chat"] = spread(tokens)
    if drawn:
        found["picture_seconds"] = spread(drawn)
    return found


if __name__ == "__main__":
    main()
