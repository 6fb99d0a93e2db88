"""One image at a time, ours (DiffGenerator) against diffusers' ZImagePipeline, eager and compiled, and OpenVINO GenAI.

emoji:  the bundled emoji-image, 128 x 128, 20 steps, guidance 3: prompt to PIL image.
medium: a random-weight Z-Image of 478 M parameters at 512 x 512, guidance 3: seconds per step and end to end.

All sides get the same prompts, seeds, dtype and threads; every repetition has a prompt of its own, so the conditions
cache serves the (empty) negative prompt only, as it does in use. Before timing, ours and diffusers must make the same
picture; how far OpenVINO's is from it is recorded. OpenVINO stands in an environment of its own (--openvino-python),
with models exported before (benchmarks/README.md): --openvino-models FOLDER has emoji/ and medium/. The last line of
stdout is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _common import Numbers, Side, figure, finish, interleave, parser, ratio, record, rounded, same_picture, say, spread
from _models import make_medium, prompt

LATENT_CHANNELS, PIXELS_PER_LATENT = 16, 8
# How many times faster than a peer ours is to be: end to end, and per step.
GOALS = {
    "emoji": ({"diffusers": 3.0}, {}),
    "medium": ({}, {"diffusers": 1.7, "compiled": 1.1}),
}
TITLES = {"emoji": "emoji-image", "medium": "478 M Z-Image"}


def main() -> None:
    """Run what the flags choose."""
    flags = _flags()
    environment = record(flags.threads)
    results: Numbers = {}
    with tempfile.TemporaryDirectory(prefix="mmgen-bench-") as folder:
        if flags.only in (None, "emoji"):
            request = {"width": 128, "height": 128, "steps": flags.steps or 20, "guidance": flags.guidance}
            results["emoji"] = compare("emoji", "emoji-image", request, flags.repeats, flags, Path(folder))
        if flags.only in (None, "medium"):
            model = flags.medium_model
            if model is None:
                say("making the 478 M checkpoint")
                model = str(make_medium(Path(folder, "medium")))
            side = flags.medium_size
            request = {"width": side, "height": side, "steps": flags.steps or 6, "guidance": flags.guidance}
            repeats = flags.medium_repeats or flags.repeats
            results["medium"] = compare("medium", model, request, repeats, flags, Path(folder))
    results["figures"] = [line for part in results.values() for line in part.pop("figures")]
    finish("image_latency", environment, results)


def _flags() -> argparse.Namespace:
    made = parser(__doc__ or "", repeats=9, max_seconds=900)
    made.add_argument("--only", choices=("emoji", "medium"))
    made.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: what we would use"
    )
    made.add_argument("--steps", type=int, help="at least 3; default: 20 for emoji, 6 for medium")
    made.add_argument("--guidance", type=float, default=3.0, help="0: one row per step; default %(default)s")
    made.add_argument("--medium-repeats", type=int, help="rounds of the medium model; default: --repeats")
    made.add_argument("--medium-size", type=int, default=512, help="pixels; default %(default)s")
    made.add_argument("--medium-model", help="a folder made before, instead of a new one")
    made.add_argument("--without", nargs="+", default=(), help="sides that are left out: compiled, openvino")
    made.add_argument("--openvino-python", help="the Python that has openvino-genai; default: no such side")
    made.add_argument("--openvino-models", help="folder with the exported models emoji/ and medium/")
    made.add_argument("--tune-peer", action="store_true", help="give diffusers our allocator and OpenMP settings too")
    flags = made.parse_args()
    if flags.steps is not None and flags.steps < 3:
        made.error("--steps must be at least 3: the first and the last step are not counted")
    if (flags.openvino_python is None) != (flags.openvino_models is None):
        made.error("--openvino-python and --openvino-models go together")
    return flags


def compare(
    part: str, model: str, request: dict[str, Any], repeats: int, flags: argparse.Namespace, folder: Path
) -> Numbers:
    """All sides on one model: check, then rounds. A round's `step_s` is the median over its steps."""
    with ExitStack() as stack:
        sides = start(part, model, flags, stack)
        dtype = sides["ours"].hello["dtype"]
        agreement, first_s = check(sides, request, dtype, folder)
        say(f"same picture in {dtype}: {agreement}")
        took = interleave(
            {
                name: lambda i, side=side: side.run(**_numbered(i + 1, i, request, folder))
                for name, side in sides.items()
            },
            repeats,
            flags.max_seconds,
        )
    seconds = {name: [answer["seconds"] for answer in answers] for name, answers in took.items()}
    steps = {name: [median(answer["step_seconds"]) for answer in answers] for name, answers in took.items()}
    peers = [name for name in sides if name != "ours"]
    whole, each = GOALS[part]
    line = f"{TITLES[part]}, {request['width']} x {request['height']}, guidance {request['guidance']:g}"
    return {
        **request,
        "dtype": dtype,
        "diffusers_tuned": flags.tune_peer,
        "agreement": agreement,
        "first_run_s": first_s,
        "end_to_end_s": {name: spread(values) for name, values in seconds.items()},
        "end_to_end_times_faster": {name: ratio(seconds[name], seconds["ours"]) for name in peers},
        "step_s": {name: spread(values) for name, values in steps.items()},
        "step_times_faster": {name: ratio(steps[name], steps["ours"]) for name in peers},
        "figures": [
            figure(f"{line}: one step", steps, each),
            figure(f"{line}: prompt to picture, {request['steps']} steps", seconds, whole),
        ],
    }


def start(part: str, model: str, flags: argparse.Namespace, stack: ExitStack) -> dict[str, Side]:
    """Load every side that is wanted; ours first, whose dtype the others take."""
    say(f"loading {Path(model).name}")
    ours = stack.enter_context(Side(kind="ours", model=model, dtype=flags.dtype, threads=flags.threads))
    sides, dtype, tuned = {"ours": ours}, ours.hello["dtype"], flags.tune_peer
    for kind in ("diffusers", "compiled"):
        if kind not in flags.without:
            side = Side(kind=kind, model=model, dtype=dtype, threads=flags.threads, calm=tuned, keep_freed=tuned)
            sides[kind] = stack.enter_context(side)
    if flags.openvino_python is not None and "openvino" not in flags.without:
        exported = str(Path(flags.openvino_models, part))
        side = Side(
            script="_openvino_side.py",
            python=flags.openvino_python,
            model=exported,
            dtype=dtype,
            threads=flags.threads,
        )
        sides["openvino"] = stack.enter_context(side)
    return sides


def check(sides: dict[str, Side], request: dict[str, Any], dtype: str, folder: Path) -> tuple[Numbers, Numbers]:
    """The untimed first runs: pictures must agree. Returns the agreements, and the seconds of the runs.

    A compiled model compiles here, and for a prompt of another length again: two prompts.
    """
    pictures: dict[str, np.ndarray] = {}
    seconds: Numbers = {}
    for name, side in sides.items():
        path = str(folder / f"{name}.npy")
        first = side.run(save=path, **_numbered(0, 12345, request, folder))
        seconds[name] = rounded(first["seconds"])
        pictures[name] = np.load(path)
        if name == "compiled":
            for other in (1, 2):
                side.run(**_numbered(other, 0, request, folder))
    agreement = {
        name: same_picture(pictures["ours"], pictures[name], dtype)
        for name in ("diffusers", "compiled")
        if name in sides
    }
    if "openvino" in sides:
        apart = np.abs(pictures["ours"].astype(int) - pictures["openvino"].astype(int))
        agreement["openvino"] = {"max_difference": int(apart.max()), "mean_difference": rounded(float(apart.mean()))}
    return agreement, seconds


def _numbered(number: int, seed: int, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The request with the number-th prompt, and the noise of its seed for whoever cannot draw it."""
    import torch

    noise = folder / f"noise-{request['width']}-{seed}.npy"
    if not noise.exists():
        shape = (1, LATENT_CHANNELS, request["height"] // PIXELS_PER_LATENT, request["width"] // PIXELS_PER_LATENT)
        np.save(noise, torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy())
    return {"prompt": prompt(number), "seed": seed, "noise": str(noise), **request}


if __name__ == "__main__":
    main()
