"""What it is worth to let glibc keep freed memory (multimodal_gen/memory/host.py), on the CPU.

Denoising steps of a random-weight Z-Image, 1536 wide and few layers deep, in two processes that take turns: one as
glibc comes, one with its thresholds raised. The same weights, arithmetic and picture, bit for bit. The last line of
stdout is JSON.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _common import Side, finish, interleave, parser, ratio, record, say, spread
from _models import make_medium, prompt


def main() -> None:
    """Run both sides."""
    made = parser(__doc__ or "", repeats=9, max_seconds=600)
    made.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: what we would use"
    )
    made.add_argument("--steps", type=int, default=6, help="per round, at least 3; default %(default)s")
    made.add_argument("--layers", type=int, default=2, help="besides 1 + 1 refiner layers; default %(default)s")
    made.add_argument("--size", type=int, default=512, help="pixels; default %(default)s")
    flags = made.parse_args()
    if flags.steps < 3:
        made.error("--steps must be at least 3: the first and the last step are not counted")
    environment = record(flags.threads)
    request = {"width": flags.size, "height": flags.size, "steps": flags.steps, "guidance": 3.0}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmgen-bench-")))
        model = str(make_medium(folder / "model", layers=flags.layers, refiner_layers=1, text_layers=2))
        sides = {
            name: stack.enter_context(
                Side(kind="verbs", model=model, dtype=flags.dtype, threads=flags.threads, calm=True, keep_freed=keep)
            )
            for name, keep in (("as_it_comes", False), ("keeps_freed", True))
        }
        check(sides, request, folder)
        took = interleave(
            {name: lambda i, side=side: _step(side, i, request) for name, side in sides.items()},
            flags.repeats,
            flags.max_seconds,
        )
    finish(
        "host_allocator",
        environment,
        {
            **request,
            "dtype": sides["keeps_freed"].hello["dtype"],
            "layers": flags.layers + 2,
            "step_s": {name: spread(values) for name, values in took.items()},
            "times_faster": ratio(took["as_it_comes"], took["keeps_freed"]),
        },
    )


def check(sides: dict[str, Side], request: dict[str, Any], folder: Path) -> None:
    """The untimed first run; raises SystemExit unless both pictures are equal."""
    pictures = []
    for name, side in sides.items():
        side.run(prompt=prompt(0), seed=1, save=str(folder / f"{name}.npy"), **request)
        pictures.append(np.load(folder / f"{name}.npy"))
    if not np.array_equal(*pictures):
        raise SystemExit("the allocator's thresholds changed the picture")
    say("same picture")


def _step(side: Side, number: int, request: dict[str, Any]) -> float:
    return median(side.run(prompt=prompt(number + 1), seed=number, **request)["step_seconds"])


if __name__ == "__main__":
    main()
