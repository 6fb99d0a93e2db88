"""Weights in fewer bits (`--quantize`): how far latents and pictures are from those of all bits, and seconds per step.

Fixed prompts and seeds. `latents_off` is ‖fewer - all‖ / ‖all‖ of the final latents; `psnr_db` of the pictures. What
rounding alone does is beside them: the same in another dtype (float32 against bfloat16), which is no loss that anybody
pays for. Sides take turns, each in a process of its own. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
from _common import Numbers, Side, figure, finish, interleave, parser, ratio, record, rounded, say, spread
from _models import make_medium, prompt

KINDS = ("int8", "int8-weights", "int4-weights")
GOALS = {"diffusers": 2.5}  # of int8


def main() -> None:
    """Quality first, then speed."""
    made = parser(__doc__ or "", repeats=3, max_seconds=400)
    made.add_argument("--model", help="folder or bundled name; default: a random-weight Z-Image of 478 M parameters")
    made.add_argument("--side", type=int, default=512, help="pixels; default %(default)s")
    made.add_argument("--steps", type=int, default=4, help="of a picture, at least 3; default %(default)s")
    made.add_argument("--guidance", type=float, default=3.0, help="default %(default)s")
    made.add_argument("--prompts", type=int, default=3, help="that quality is told for; default %(default)s")
    made.add_argument("--kinds", nargs="+", default=KINDS, help="default: all that a CPU has")
    made.add_argument("--diffusers", action="store_true", help="diffusers' steps beside them, as it computes by itself")
    made.add_argument("--rounding", action="store_true", help="say what float32 instead of bfloat16 changes, too")
    flags = made.parse_args()
    environment = record(flags.threads)
    request = {
        "width": flags.side,
        "height": flags.side,
        "num_inference_steps": flags.steps,
        "guidance_scale": flags.guidance,
    }
    with tempfile.TemporaryDirectory(prefix="mmgen-bench-") as place, ExitStack() as stack:
        folder = Path(place)
        model = flags.model or str(make_medium(folder / "medium"))
        ways: dict[str, Numbers] = {"none": {}, **{kind: {"quantize": kind} for kind in flags.kinds}}
        if flags.rounding:
            ways["float32"] = {"dtype": "float32"}
        sides = {
            name: stack.enter_context(
                Side(script="_quantize_side.py", model=model, threads=flags.threads, **{"dtype": "bfloat16", **way})
            )
            for name, way in ways.items()
        }
        say("quality")
        made_by = {name: outputs(side, request, flags.prompts, folder) for name, side in sides.items()}
        quality = {name: compare(found, made_by["none"]) for name, found in made_by.items() if name != "none"}
        runs: dict[str, Callable[[int], float]] = {
            name: lambda i, side=side: median(side.run(prompt=prompt(i), seed=i, **request)["step_seconds"])
            for name, side in sides.items()
            if name != "float32"
        }
        if flags.diffusers:
            theirs = stack.enter_context(Side(kind="diffusers", model=model, threads=flags.threads, dtype="bfloat16"))
            words = {"width": flags.side, "height": flags.side, "steps": flags.steps, "guidance": flags.guidance}
            runs["diffusers"] = lambda i: median(theirs.run(prompt=prompt(i), seed=i, **words)["step_seconds"])
        took = interleave(runs, flags.repeats, flags.max_seconds)
        times_faster = {name: ratio(took["none"], took[name]) for name in flags.kinds}
        results = {
            **{"model": flags.model or "478 M", **request},
            "quality": quality,
            "step_s": {name: spread(values) for name, values in took.items()},
            "times_faster": times_faster,
            "figures": _figures(took, flags),
            "loaded": {name: side.hello for name, side in sides.items()},
        }
    finish("quantize", environment, results)


def _figures(took: dict[str, list[float]], flags: argparse.Namespace) -> list[Numbers]:
    peers = {name: took[name] for name in ("none", "diffusers") if name in took}
    line = f"{Path(flags.model).name if flags.model else '478 M Z-Image'}, {flags.side} x {flags.side}: one step"
    return [
        figure(f"{line}, {kind}", {"ours": took[kind], **peers}, GOALS if kind == "int8" and flags.diffusers else {})
        for kind in flags.kinds
    ]


def outputs(side: Side, request: Numbers, prompts: int, folder: Path) -> dict[str, list[np.ndarray]]:
    """Latents and pictures of the first prompts."""
    found: dict[str, list[np.ndarray]] = {"latent": [], "np": []}
    for number in range(prompts):
        for kind, kept in found.items():
            path = folder / "output.npy"
            side.run(prompt=prompt(number), seed=number, output_type=kind, save=str(path), **request)
            kept.append(np.load(path))
    return found


def compare(found: dict[str, list[np.ndarray]], exact: dict[str, list[np.ndarray]]) -> Numbers:
    """One kind against all bits."""
    pairs = list(zip(found["latent"], exact["latent"], strict=True))
    off = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]
    pictures = zip(found["np"], exact["np"], strict=True)
    decibels = [10 * np.log10(255.0**2 / float(np.mean((a - b) ** 2))) for a, b in pictures]
    return {
        "latents_off": {"median": rounded(median(off)), "max": rounded(max(off))},
        "psnr_db": {"median": rounded(median(decibels)), "min": rounded(min(decibels))},
    }


if __name__ == "__main__":
    main()
