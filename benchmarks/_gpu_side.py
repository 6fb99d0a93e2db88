"""One side of `gpu.py`, in a process of its own: loads a pipeline, tells of it in one line of JSON, ends.

A GPU works on while Python goes on, so a step is (a run of many steps - a run of few) / (their difference), with the
device synchronised at both ends of a run; both runs encode the same prompt.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FEW, ROUNDS = 3, 3
PROMPT = "a small red apple on a blue background"

Run = Callable[[int, float, bool], object]  # (steps, guidance, pixels wanted)
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "graphs": {"cuda_graphs": True},
    "compile": {"compile": True},
    "fp8": {"quantize": "fp8"},
    "int8": {"quantize": "int8"},
    "int8-weights": {"quantize": "int8-weights"},
    "graphs-fp8": {"cuda_graphs": True, "quantize": "fp8"},
    "graphs-int8": {"cuda_graphs": True, "quantize": "int8"},
    "layerwise": {"offload": "layerwise", "resident_layers": 0},
}
THEIRS = ("diffusers", "diffusers-compile")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    kind: str
    """a key of OURS, or one of THEIRS"""
    model: str
    size: int
    many: int
    """steps of the longer run"""
    device: str
    guidances: tuple[float, ...]


def ours(options: Options) -> tuple[Run, Callable[[], None]]:
    from multimodal_gen import DiffGenerator

    gen = DiffGenerator.from_pretrained(options.model, device=options.device, dtype="bfloat16", **OURS[options.kind])

    def run(steps: int, guidance: float, pixels: bool) -> object:
        size = {"width": options.size, "height": options.size}
        wish = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np" if pixels else "latent"}
        return gen.generate(PROMPT, seed=1, **size, **wish)

    return run, gen.close


def theirs(options: Options) -> tuple[Run, Callable[[], None]]:
    """As diffusers is used on a GPU; compiled by blocks, as it advises."""
    import torch
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(options.model, dtype=torch.bfloat16).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    if options.kind == "diffusers-compile":
        pipe.transformer.compile_repeated_blocks()

    def run(steps: int, guidance: float, pixels: bool) -> object:
        generator, size = torch.Generator().manual_seed(1), {"width": options.size, "height": options.size}
        wish = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np" if pixels else "latent"}
        return pipe(PROMPT, generator=generator, **size, **wish)

    return run, lambda: None


def main() -> None:
    """Load, warm up, measure."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    given = json.loads(sys.argv[1])
    options = Options(**{**given, "guidances": tuple(given["guidances"])})
    import torch

    on_gpu = options.device.startswith("cuda")

    def timed(work: Callable[[], object]) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    begin = time.perf_counter()
    run, close = (theirs if options.kind in THEIRS else ours)(options)
    found: dict[str, Any] = {"load_s": time.perf_counter() - begin}
    found["first_run_s"] = timed(lambda: run(FEW, options.guidances[0], True))
    for guidance in options.guidances:
        for _ in range(2):
            run(FEW, guidance, False)
        rounds = []
        for _ in range(ROUNDS):
            few, many = (timed(lambda n=n, g=guidance: run(n, g, False)) for n in (FEW, options.many))
            rounds.append((many - few) / (options.many - FEW))
        found[f"step_s, guidance {guidance:g}"] = rounds
    run(FEW, options.guidances[0], True)
    pairs = [tuple(timed(lambda p=p: run(FEW, options.guidances[0], p)) for p in (False, True)) for _ in range(ROUNDS)]
    found["decode_s"] = statistics.median(whole - latents for latents, whole in pairs)
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    close()
    answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
