"""Weights that do not stay in memory, on the CPU: layers that pass through a ring of slots while others compute.

peers   the 478 M Z-Image: ours streamed and resident against diffusers' group offload (leaf, block, both from disk):
        seconds to the first step (process start, imports and loading included), per step, for the switch to an adapter,
        per step with it; peak memory
larger  a Z-Image of gigabytes in a memory limit of a third of its weights beyond what Python and torch need, read from
        the disk: peak anonymous memory against its formula; seconds per step against resident, and against the floor
        max(compute, bytes / bandwidth), at a size that the disk bounds and at one that compute bounds
fits    what streaming costs where the files are in the page cache and compute bounds the step

Memory is said in three figures (`_watch.py`): anon cannot be dropped by the kernel, file are mapped pages that can be,
pss is both, shared pages by share. Every part ends with a line of JSON on stdout.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from _common import Numbers, Side, finish, interleave, parser, ratio, record, say, spread
from _models import make_adapters, make_deep, make_medium, prompt
from _offload_larger import larger
from _offload_peers import RESIDENT, STREAMED, compare

PARTS = ("peers", "larger", "fits")


def main() -> None:
    """Run what the flags choose."""
    flags = _flags()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # gigabytes and a control group are to be taken away
    environment = record(flags.threads)
    with tempfile.TemporaryDirectory(prefix="mmgen-bench-", dir=flags.folder) as place:
        folder = Path(place)
        medium = flags.medium_model
        if medium is None and set(flags.only) & {"peers", "fits"}:
            say("making the 478 M checkpoint")
            medium = str(make_medium(folder / "medium"))
        for part in flags.only:
            say(f"part {part}")
            if part == "peers":
                adapter = make_adapters(Path(medium), folder)[0]
                found = compare(medium, adapter, flags, folder)
            elif part == "larger":
                if flags.deep_model is None:
                    say(f"making a checkpoint of {flags.layers} layers")
                    make_deep(folder / "deep", layers=flags.layers)
                found = larger(Path(flags.deep_model or folder / "deep"), flags, folder)
            else:
                found = fits(medium, flags)
            finish("offload", environment, {"part": part, **found})


def _flags() -> argparse.Namespace:
    made = parser(__doc__ or "", repeats=2, max_seconds=300)
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts; default: all")
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: %(default)s")
    made.add_argument("--side", type=int, default=256, help="pixels, of peers; default %(default)s")
    made.add_argument("--steps", type=int, default=5, help="of a measurement, at least 3; default %(default)s")
    made.add_argument("--deep-model", help="a folder made before, instead of a new one")
    made.add_argument("--layers", type=int, default=54, help="of the large model, 61 MB each; default %(default)s")
    made.add_argument(
        "--small", type=int, default=128, help="pixels, of larger, bound by the disk; default %(default)s"
    )
    made.add_argument("--large", type=int, default=1024, help="the same, bound by compute; default %(default)s")
    made.add_argument("--large-steps", type=int, default=2, help="at that size; default %(default)s")
    made.add_argument("--fits", type=int, default=512, help="pixels, of fits; default %(default)s")
    made.add_argument("--medium-model", help="a folder made before, instead of a new one")
    made.add_argument(
        "--folder", help="where checkpoints are made, on the disk to be measured; default: for temporary files"
    )
    return made.parse_args()


def fits(model: str, flags: argparse.Namespace) -> Numbers:
    """Streamed against resident, the files in the page cache."""
    options = {"model": model, "dtype": flags.dtype, "threads": flags.threads, "place": "", "kind": "ours"}
    modes = {"streamed": STREAMED, "resident": RESIDENT}
    request = {"width": flags.fits, "height": flags.fits, "num_inference_steps": flags.steps, "guidance_scale": 3.0}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Side(script="_offload_side.py", mode=mode, **options))
            for name, mode in modes.items()
        }

        def steps(side: Side, number: int) -> list[float]:
            ends = side.run(do="steps", prompt=prompt(number), seed=number, **request)["ends"]
            return [later - earlier for earlier, later in pairwise(ends)]

        runs = {name: (lambda number, side=side: steps(side, number)) for name, side in sides.items()}
        took = interleave(runs, flags.repeats, flags.max_seconds)
    seconds = {name: [value for values in rounds for value in values] for name, rounds in took.items()}
    return {
        "side": flags.fits,
        "dtype": flags.dtype,
        "step_s": {name: spread(values) for name, values in seconds.items()},
        "streamed_over_resident": ratio(seconds["streamed"], seconds["resident"]),
    }


if __name__ == "__main__":
    main()
