"""One kind of weights: loads a model, then makes pictures. Started by `_common.Side`, not by hand.

argv[1] and each line of stdin are JSON objects; each answer is one line of stdout.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from itertools import pairwise
from typing import Any

import numpy as np


def main() -> None:
    """Load, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to stdout; the parent must see answers only
    from multimodal_gen import DiffGenerator

    options = json.loads(sys.argv[1])
    begin = time.perf_counter()
    gen = DiffGenerator.from_pretrained(options.pop("model"), device="cpu", **options)
    hello = {"load_s": time.perf_counter() - begin, "peak_mb": peak_mb(), "dtype": gen.info.dtype}
    answers.write(json.dumps(hello) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(_answer(gen, json.loads(line))) + "\n")


def peak_mb() -> float:
    """Largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _answer(gen: Any, request: dict[str, Any]) -> dict[str, Any]:
    save, ends = request.pop("save", None), list[float]()
    output = gen.generate(**request, on_step=lambda _: ends.append(time.perf_counter()))
    if save:
        np.save(save, np.asarray(output.images[0] if output.latents is None else output.latents, dtype=np.float32))
    between = [later - earlier for earlier, later in pairwise(ends)]
    # The first step stands behind the encoder; the engine reports the last one after decoding.
    return {"step_seconds": between[:-1]}


if __name__ == "__main__":
    main()
