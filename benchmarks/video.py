"""One video at a time, ours (DiffGenerator) against diffusers' WanPipeline, on the CPU.

Random weights in the shape of Wan2.1 T2V 1.3B, cut to a few layers (of 30), with a UMT5-XXL-shaped encoder cut to two
(of 24) and the published VAE: seconds per step, for the texts and for the VAE, and peak memory. Steps scale with the
layers, so their ratio is that of the whole model.

Both sides get the same prompts, seeds, dtype and threads; every repetition has a prompt of its own. Before timing, the
latents of both must agree. The VAE is timed in a run of its own, at a smaller size.
The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _common import Numbers, Side, figure, finish, interleave, parser, ratio, record, rounded, say, spread
from _models import make_wan_slice, prompt

PARTS = {
    "steps": ("one step under guidance", 1.6),
    "encode": ("both prompts", 5.0),
    "decode": ("VAE decode", 1.5),
}
"""Part of an answer → its line in the report, and how many times faster than diffusers it is to be."""
AGREEMENT = {"width": 128, "height": 128, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 4.0}


def main() -> None:
    """Run what the flags choose."""
    flags = _flags()
    environment = record(flags.threads)
    with tempfile.TemporaryDirectory(prefix="mmgen-bench-") as folder:
        model = flags.model
        if model is None:
            say(f"making a checkpoint of {flags.layers} layers")
            model = str(make_wan_slice(Path(folder, "wan"), layers=flags.layers, text_layers=2))
        finish("video", environment, compare(model, flags, Path(folder)))


def _flags() -> argparse.Namespace:
    made = parser(__doc__ or "", repeats=3, max_seconds=1200)
    made.add_argument("--layers", type=int, default=2, help="of the transformer; default %(default)s")
    made.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    made.add_argument("--size", default="832x480", help="of the steps; default %(default)s")
    made.add_argument("--decode-size", default="256x160", help="of the VAE's run; default %(default)s")
    made.add_argument("--frames", type=int, default=17, help="default %(default)s")
    made.add_argument("--steps", type=int, default=4, help="at least 3; default %(default)s")
    made.add_argument("--model", help="a folder made before, instead of a new one")
    return made.parse_args()


def compare(model: str, flags: argparse.Namespace, folder: Path) -> Numbers:
    """Both sides on one model: check, then rounds."""
    request = _request(flags.size, flags.frames, flags.steps)
    decoding = _request(flags.decode_size, flags.frames, 1)
    with ExitStack() as stack:
        script, threads = "_video_side.py", flags.threads
        ours = stack.enter_context(Side(script=script, kind="ours", model=model, dtype=flags.dtype, threads=threads))
        dtype = ours.hello["dtype"]
        theirs = stack.enter_context(Side(script=script, kind="diffusers", model=model, dtype=dtype, threads=threads))
        agreement = check(ours, theirs, dtype, folder)
        say(f"latents agree in {dtype}: {agreement}")
        sides, latents = {"ours": ours, "diffusers": theirs}, str(folder / "latents.npy")

        def both(**options: Any) -> dict[str, list[Numbers]]:
            runs = {
                name: lambda i, side=side: side.run(prompt=prompt(i + 1), seed=i, **options)
                for name, side in sides.items()
            }
            return interleave(runs, flags.repeats, flags.max_seconds)

        took = both(save=latents, **request)
        decoded = both(**decoding)
    found: Numbers = {**request, "dtype": dtype, "layers": flags.layers, "latent_relative_error": agreement}
    found["decode_size"] = flags.decode_size
    found["figures"] = []
    for part, (title, goal) in PARTS.items():
        source = decoded if part == "decode" else took
        seconds = {name: [_seconds(answer[part]) for answer in answers] for name, answers in source.items()}
        found[f"{part}_s"] = {name: spread(values) for name, values in seconds.items()}
        found[f"{part}_times_faster"] = ratio(seconds["diffusers"], seconds["ours"])
        size = flags.decode_size if part == "decode" else flags.size
        line = f"Wan 1.3B-shaped, {flags.layers} layers, {size}, {flags.frames} frames: {title}"
        found["figures"].append(figure(line, seconds, {"diffusers": goal}))
    found["peak_gib"] = {name: rounded(answers[-1]["peak_gib"]) for name, answers in took.items()}
    return found


def _request(size: str, frames: int, steps: int) -> dict[str, Any]:
    width, height = (int(side) for side in size.split("x"))
    return {
        "width": width,
        "height": height,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
    }


def _seconds(value: float | list[float]) -> float:
    return median(value) if isinstance(value, list) else value


def check(ours: Side, theirs: Side, dtype: str, folder: Path) -> float:
    """Relative distance of the latents of a short run. Raises: SystemExit where the sides do other work."""
    latents = []
    for name, side in (("ours", ours), ("theirs", theirs)):
        path = str(folder / f"{name}.npy")
        side.run(prompt=prompt(0), seed=12345, save=path, **AGREEMENT)
        latents.append(np.load(path))
    distance = float(np.linalg.norm(latents[0] - latents[1]) / np.linalg.norm(latents[1]))
    if distance > (1e-4 if dtype == "float32" else 0.05):
        raise SystemExit(f"the two sides do not make the same latents in {dtype}: they are {distance:.2g} apart")
    return rounded(distance)


if __name__ == "__main__":
    main()
