"""One image at a time, ours (DiffGenerator) against diffusers' ZImagePipeline, on the CPU.

emoji:  the bundled emoji-image, 128 x 128, 20 steps, guidance 3: prompt to PIL image.
medium: a random-weight Z-Image of 478 M parameters at 512 x 512, guidance 3: seconds per step and end to end.

Both sides get the same prompts, seeds, dtype and threads; every repetition has a prompt of its own, so the conditions
cache serves the (empty) negative prompt only, as it does in use. Before timing, the two sides must make the same
picture. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _common import Numbers, Side, finish, interleave, parser, ratio, record, same_picture, say, spread
from _models import make_medium, prompt


def main() -> None:
    """Run what the flags choose."""
    flags = _flags()
    environment = record(flags.threads)
    results: Numbers = {}
    with tempfile.TemporaryDirectory(prefix="mmgen-bench-") as folder:
        if flags.only in (None, "emoji"):
            request = {"width": 128, "height": 128, "steps": flags.steps or 20, "guidance": 3.0}
            results["emoji"] = compare("emoji-image", request, flags.repeats, flags, Path(folder))
        if flags.only in (None, "medium"):
            model = flags.medium_model
            if model is None:
                say("making the 478 M checkpoint")
                model = str(make_medium(Path(folder, "medium")))
            side = flags.medium_size
            request = {"width": side, "height": side, "steps": flags.steps or 6, "guidance": 3.0}
            results["medium"] = compare(model, request, flags.medium_repeats or flags.repeats, flags, Path(folder))
    finish("image_latency", environment, results)


def _flags() -> argparse.Namespace:
    made = parser(__doc__ or "", repeats=9, max_seconds=900)
    made.add_argument("--only", choices=("emoji", "medium"))
    made.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: what we would use"
    )
    made.add_argument("--steps", type=int, help="at least 3; default: 20 for emoji, 6 for medium")
    made.add_argument("--medium-repeats", type=int, help="rounds of the medium model; default: --repeats")
    made.add_argument("--medium-size", type=int, default=512, help="pixels; default %(default)s")
    made.add_argument("--medium-model", help="a folder made before, instead of a new one")
    made.add_argument("--tune-peer", action="store_true", help="give diffusers our allocator and OpenMP settings too")
    flags = made.parse_args()
    if flags.steps is not None and flags.steps < 3:
        made.error("--steps must be at least 3: the first and the last step are not counted")
    return flags


def compare(model: str, request: dict[str, Any], repeats: int, flags: argparse.Namespace, folder: Path) -> Numbers:
    """Both sides on one model: check, then rounds. A round's `step_s` is the median over its steps."""
    with ExitStack() as stack:
        say(f"loading {Path(model).name}")
        ours = stack.enter_context(Side(kind="ours", model=model, dtype=flags.dtype, threads=flags.threads))
        dtype = ours.hello["dtype"]
        theirs = stack.enter_context(
            Side(
                kind="diffusers",
                model=model,
                dtype=dtype,
                threads=flags.threads,
                calm=flags.tune_peer,
                keep_freed=flags.tune_peer,
            )
        )
        agreement = check(ours, theirs, request, dtype, folder)
        say(f"same picture in {dtype}: {agreement}")
        took = interleave(
            {
                "ours": lambda i: ours.run(prompt=prompt(i + 1), seed=i, **request),
                "diffusers": lambda i: theirs.run(prompt=prompt(i + 1), seed=i, **request),
            },
            repeats,
            flags.max_seconds,
        )
    seconds = {name: [answer["seconds"] for answer in answers] for name, answers in took.items()}
    steps = {name: [median(answer["step_seconds"]) for answer in answers] for name, answers in took.items()}
    return {
        **request,
        "dtype": dtype,
        "diffusers_tuned": flags.tune_peer,
        "agreement": agreement,
        "end_to_end_s": {name: spread(values) for name, values in seconds.items()},
        "end_to_end_times_faster": ratio(seconds["diffusers"], seconds["ours"]),
        "step_s": {name: spread(values) for name, values in steps.items()},
        "step_times_faster": ratio(steps["diffusers"], steps["ours"]),
    }


def check(ours: Side, theirs: Side, request: dict[str, Any], dtype: str, folder: Path) -> Numbers:
    """The untimed first run of both sides, whose pictures must agree."""
    pictures = []
    for name, side in (("ours", ours), ("theirs", theirs)):
        path = str(folder / f"{name}.npy")
        side.run(prompt=prompt(0), seed=12345, save=path, **request)
        pictures.append(np.load(path))
    return same_picture(pictures[0], pictures[1], dtype)


if __name__ == "__main__":
    main()
