"""Bytes that every scheme of parallelism sends per denoising step and rank, beside the formula.

Random-weight models with the width of Wan2.1-1.3B and of a small Z-Image, a few layers deep, on real processes over
gloo. Each operation counts what it has to put on the wire; the kernel's count of what the process wrote to its sockets
stands beside it (Linux only; headers included). No times: processes that share the cores of one machine show nothing
about a network. The last line of stdout is JSON; the exit code is 1 when a count is not what the formula says.

With n tokens per rank, width d, P ranks and b bytes per number, per transformer block:

    Ulysses            4 · n · d · (P - 1) / P · b       q, k and v there, the result back
    ring               2 · n · d · (P - 1) · b           k and v around
    tensor parallel    2 · n · d · 2 · (P - 1) / P · b   an all-reduce after attention and after the feed-forward;
                                                        Wan has a third, after cross-attention, and small ones for norms
    guidance on two    the velocity of one branch, once per step

and once per step, where a sequence is shared, the gathering of its slices.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from _common import Numbers, finish, parser, record, rounded, say

from multimodal_gen.parallel.degrees import Degrees
from tests.support.checkpoints import NEGATIVE, PROMPT, make_z_image
from tests.support.ranks import Ranks
from tests.support.wan_checkpoints import make_wan

SCHEMES = (
    Degrees(tp=2),
    Degrees(tp=4),
    Degrees(ulysses=2),
    Degrees(ulysses=4),
    Degrees(ring=2),
    Degrees(ring=3),
    Degrees(ring=4),
    Degrees(ulysses=2, ring=2),
    Degrees(cfg=2),
    Degrees(tp=2, ulysses=2),
    Degrees(tp=2, ring=2),
    Degrees(tp=2, cfg=2),
    Degrees(ulysses=2, cfg=2),
)
HEADS, LAYERS = 12, 2
WIDTHS = {"z_image": HEADS * 120, "wan": HEADS * 128}  # Z-Image's head width is three equal, even rotary axes here
FLOAT = 4  # bytes
CAPTION = 32  # tokens of a short prompt, padded


@dataclass(frozen=True)
class Step:
    """What one row under guidance is in a step, on the ranks of one guidance group."""

    stages: tuple[tuple[int, int], ...]  # tokens of the packed batch, transformer blocks that they go through
    width: int  # d
    reduced: tuple[int, ...]  # numbers per token of each all-reduce of a block, if weights are shared
    gathered: tuple[tuple[int, int], ...]  # tokens, numbers per token of each gathering, if the sequence is shared
    velocity: int  # numbers of one branch's result


def z_image(size: int, groups: int) -> Step:
    """An image of `size` pixels a side; both prompts are short, so that they share the image's own stage."""
    image = (size // 16) ** 2
    image_padded, branches = ceil(image / 32) * 32, 2 // groups
    joint, width, patch = branches * (image_padded + CAPTION), WIDTHS["z_image"], 64
    return Step(
        stages=((image_padded, 1), (joint, LAYERS)),
        width=width,
        reduced=(width, width),
        gathered=((image_padded, width), (joint, patch)),
        velocity=image * patch,
    )


def wan(width: int, height: int, frames: int, groups: int) -> Step:
    """A video; the norms of queries and keys reduce one number per token for each of self q, self k and cross q."""
    tokens = (frames - 1) // 4 + 1
    tokens *= (width // 16) * (height // 16)
    branches, dim, patch = 2 // groups, WIDTHS["wan"], 64
    return Step(
        stages=((branches * tokens, LAYERS),),
        width=dim,
        reduced=(2, dim, 1, dim, dim),
        gathered=((branches * tokens, patch),),
        velocity=tokens * patch,
    )


def formula(step: Step, degrees: Degrees) -> Counter[str]:
    """Bytes by operation that one rank sends for a step."""
    tp, ulysses, ring, sp = degrees.tp, degrees.ulysses, degrees.ring, degrees.sp
    sent: Counter[str] = Counter()
    for tokens, blocks in step.stages:
        n, width = ceil(tokens / sp), step.width // tp
        sent["all_to_all"] += blocks * 4 * n * width * (ulysses - 1) // ulysses * FLOAT
        sent["shift"] += blocks * 2 * n * width * (ring - 1) * FLOAT  # a station's tokens times its share of the heads
        sent["all_reduce"] += blocks * sum(2 * (tp - 1) * ceil(n * numbers / tp) for numbers in step.reduced) * FLOAT
    for tokens, numbers in step.gathered:
        sent["all_gather"] += (sp - 1) * ceil(tokens / sp) * numbers * FLOAT
    sent["all_gather"] += (degrees.cfg - 1) * step.velocity * FLOAT
    return +sent


def main() -> None:
    """Run every scheme with both families."""
    made = parser(__doc__ or "", repeats=1, max_seconds=900)
    made.add_argument("--size", type=int, default=512, help="pixels of the image; default %(default)s")
    made.add_argument("--video", default="416x240x9", help="width x height x frames; default %(default)s")
    flags = made.parse_args()
    width, height, frames = (int(part) for part in flags.video.split("x"))
    environment = record(1)
    image = {"width": flags.size, "height": flags.size, "guidance_scale": 3.0}
    video = {"width": width, "height": height, "num_frames": frames, "guidance_scale": 3.0}
    with tempfile.TemporaryDirectory(prefix="mmgen-bench-") as folder, Ranks(4) as ranks:
        models = {
            "z_image": make_z_image(Path(folder) / "z_image", heads=HEADS, head_dim=120, layers=LAYERS),
            "wan": make_wan(Path(folder) / "wan", heads=HEADS, head_dim=128, layers=LAYERS, ffn=8960),
        }
        found: dict[str, Numbers] = {}
        for family, path in models.items():
            request = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **(image if family == "z_image" else video)}
            for degrees in SCHEMES:
                step = (
                    z_image(flags.size, degrees.cfg) if family == "z_image" else wan(width, height, frames, degrees.cfg)
                )
                found[f"{family}, {degrees}"] = one(ranks, degrees, str(path), request, formula(step, degrees))
                say(f"{family}, {degrees}: {found[f'{family}, {degrees}']}")
    equal = all(case["equal"] for case in found.values())
    finish("parallel", environment, {"image": image, "video": video, "bytes_per_step_and_rank": found, "equal": equal})
    if not equal:
        raise SystemExit(1)


def one(ranks: Ranks, degrees: Degrees, folder: str, request: dict[str, Any], expected: Counter[str]) -> Numbers:
    """One scheme: counted on the rank that sent most, expected, and written to sockets."""
    results = ranks.run(degrees, "benchmarks._parallel_side:measure", folder=folder, request=request)
    counted = [
        {name: int(count) for name, count in found.items() if name != "on_the_wire" and int(count)} for found in results
    ]
    total = sum(expected.values())
    wire = max(int(found["on_the_wire"]) for found in results)
    return {
        "counted": max(counted, key=lambda rank: sum(rank.values())),
        "formula": dict(expected),
        "on_the_wire": wire,
        "wire_over_formula": rounded(wire / total),
        "equal": all(rank == dict(expected) for rank in counted),
    }


if __name__ == "__main__":
    main()
