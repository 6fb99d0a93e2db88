"""What step caches cost in quality and save in time, on the CPU.

emoji:  the bundled emoji-image, 128 x 128, guidance 3, at 20 and at 40 steps. Each cache against the picture of all
        steps: PSNR, steps computed, seconds of denoising. What fewer steps give without a cache stands beside it: a
        cache that does no better is worth nothing.
wan:    random weights in the shape of Wan2.1 T2V 1.3B, cut to a few layers: seconds of denoising only. Random weights
        say nothing of the quality that trained ones have.

All ways take turns in one process, prompt by prompt. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import Numbers, finish, interleave, parser, ratio, record, rounded, say, spread
from _models import make_wan_slice, prompt

CACHES = (
    "taylor",
    "taylor:order=0",
    "taylor:interval=3",
    "first-block:threshold=0.05",
    "first-block",
    "first-block:order=0",
    "first-block:threshold=0.2",
)
FEWER = {20: (16, 13, 11), 40: (28, 23, 17)}  # steps without a cache


def main() -> None:
    """Run what the flags choose."""
    flags = _flags()
    environment = record(flags.threads)
    results: Numbers = {}
    if flags.only in (None, "emoji"):
        for steps in flags.steps:
            results[f"emoji_{steps}_steps"] = emoji(steps, flags)
    if flags.only in (None, "wan"):
        with tempfile.TemporaryDirectory(prefix="mmgen-bench-") as folder:
            say(f"making a checkpoint of {flags.layers} layers")
            model = flags.model or str(make_wan_slice(Path(folder, "wan"), layers=flags.layers, text_layers=2))
            results["wan"] = wan(model, flags)
    finish("step_cache", environment, results)


def _flags() -> argparse.Namespace:
    made = parser(__doc__ or "", repeats=8, max_seconds=900)
    made.add_argument("--only", choices=("emoji", "wan"))
    made.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    made.add_argument("--caches", nargs="*", default=CACHES, help="of emoji; default: %(default)s")
    made.add_argument("--fewer", type=int, nargs="*", help="steps to compare with; default: three numbers of them")
    made.add_argument("--steps", type=int, nargs="+", default=[20, 40], choices=sorted(FEWER), help="of emoji")
    made.add_argument("--layers", type=int, default=4, help="of Wan's transformer; default %(default)s")
    made.add_argument("--model", help="a Wan folder made before, instead of a new one")
    return made.parse_args()


def _fewer(steps: int, flags: argparse.Namespace) -> Sequence[int]:
    return FEWER[steps] if flags.fewer is None else flags.fewer


def emoji(steps: int, flags: argparse.Namespace) -> Numbers:
    """A row per way: quality against all steps, and time."""
    from multimodal_gen import DiffGenerator

    with DiffGenerator.from_pretrained(device="cpu", dtype=flags.dtype, threads=flags.threads) as gen:
        dtype = gen.info.dtype

        def run(number: int, **options: Any) -> tuple[np.ndarray, int, float]:
            """Pixels, steps computed, seconds."""
            result = gen.generate(prompt(number), seed=number, output_type="np", **options)
            computed = result.timings.steps - result.timings.cached_steps
            return result.images[0], computed, result.timings.denoise

        ways = {"all": {"num_inference_steps": steps}}
        ways |= {f"{fewer} steps": {"num_inference_steps": fewer} for fewer in _fewer(steps, flags)}
        ways |= {cache: {"num_inference_steps": steps, "step_cache": cache} for cache in flags.caches}
        for options in ways.values():  # the first of a kind is slower
            run(0, **options)
        took = interleave(
            {name: lambda i, options=options: run(i + 1, **options) for name, options in ways.items()},
            flags.repeats,
            flags.max_seconds,
        )
        whole = took.pop("all")
        seconds = [each[2] for each in whole]
        rows: Numbers = {"all": {"seconds": spread(seconds)}}
        for name, results in took.items():
            rows[name] = {
                "computed": rounded(float(np.mean([each[1] for each in results]))),
                **_quality([each[0] for each in results], [each[0] for each in whole]),
                "seconds": spread([each[2] for each in results]),
                "times_faster": ratio(seconds, [each[2] for each in results]),
            }
            say(f"{steps} steps, {name}: {rows[name]}")
    return {"dtype": dtype, "steps": steps, "ways": rows}


def _quality(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> Numbers:
    """PSNR in dB of uint8 pictures: mean and worst."""
    errors = [((a.astype(float) - b.astype(float)) ** 2).mean() for a, b in zip(found, wanted, strict=True)]
    psnr = [10 * np.log10(255**2 / max(error, 1e-3)) for error in errors]
    return {"psnr_db": rounded(float(np.mean(psnr))), "worst_psnr_db": rounded(float(min(psnr)))}


def wan(model: str, flags: argparse.Namespace) -> Numbers:
    """Seconds of a run of ten steps, with and without caches; random weights stay below one threshold and no other."""
    from multimodal_gen import DiffGenerator

    request = {"width": 256, "height": 144, "num_frames": 9, "num_inference_steps": 10, "guidance_scale": 5.0}
    ways = {
        "all": {},
        "taylor:interval=2": {"step_cache": "taylor:interval=2,warmup=2"},
        "taylor:interval=3": {"step_cache": "taylor:interval=3,warmup=2"},
        "first-block, every second step": {"step_cache": "first-block:threshold=10,most=1,warmup=2"},
        "first-block, no step": {"step_cache": "first-block:threshold=1e-9,warmup=2"},
    }
    with DiffGenerator.from_pretrained(model, device="cpu", dtype=flags.dtype, threads=flags.threads) as gen:

        def run(number: int, **options: Any) -> tuple[int, float]:
            result = gen.generate(prompt(number), seed=number, output_type="latent", **request, **options)
            return result.timings.steps - result.timings.cached_steps, result.timings.denoise

        for options in ways.values():
            run(0, **options)
        took = interleave(
            {name: lambda i, options=options: run(i + 1, **options) for name, options in ways.items()},
            flags.repeats,
            flags.max_seconds,
        )
    seconds = {name: [each[1] for each in results] for name, results in took.items()}
    return {
        **request,
        "layers": flags.layers,
        "computed": {name: results[0][0] for name, results in took.items()},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_faster": {name: ratio(seconds["all"], values) for name, values in seconds.items() if name != "all"},
    }


if __name__ == "__main__":
    main()
