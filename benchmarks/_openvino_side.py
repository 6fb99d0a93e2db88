"""OpenVINO GenAI as a side: loads an exported Z-Image, then answers requests. Started by `_common.Side`, not by hand.

Runs in an environment of its own, without torch and without ours. argv[1] and each line of stdin are JSON objects; each
answer is one line of stdout.
"""

import json
import os
import sys
import time
from itertools import pairwise
from typing import Any

import numpy as np
import openvino_genai

PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}


class Given(openvino_genai.Generator):  # type: ignore[misc]
    """Noise that was drawn elsewhere, so that both sides start from the same."""

    def __init__(self, noise: np.ndarray) -> None:
        super().__init__()
        self._values = iter(noise.reshape(-1).tolist())

    def next(self) -> float:
        """The next value."""
        return next(self._values)


def main() -> None:
    """Load, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print to stdout; the parent must see answers only
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    hints = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[options["dtype"]],
        "INFERENCE_NUM_THREADS": options["threads"],
        "PERFORMANCE_HINT": "LATENCY",
    }
    pipe = openvino_genai.Text2ImagePipeline(options["model"], "CPU", **hints)
    answers.write(json.dumps({"dtype": options["dtype"], "attention": "openvino's"}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(run(pipe, json.loads(line))) + "\n")


def run(pipe: Any, request: dict[str, Any]) -> dict[str, Any]:
    """One picture, in the words of `_side.Request`; its `noise` is the .npy file to start from."""
    ends: list[float] = []

    def after_step(_step: int, _steps: int, _latent: Any) -> bool:
        ends.append(time.perf_counter())
        return False

    noise = Given(np.load(request["noise"]))
    begin = time.perf_counter()
    picture = pipe.generate(
        request["prompt"],
        width=request["width"],
        height=request["height"],
        num_inference_steps=request["steps"],
        guidance_scale=request["guidance"],
        generator=noise,
        callback=after_step,
    ).data
    seconds = time.perf_counter() - begin
    if request.get("save"):
        np.save(request["save"], picture[0])
    between = [later - earlier for earlier, later in pairwise(ends)]
    return {"seconds": seconds, "step_seconds": between[:-1]}


if __name__ == "__main__":
    main()
