"""One side of `video.py`: loads a Wan pipeline, then answers requests. Started by `_common.Side`, not by hand.

argv[1] and each line of stdin are JSON objects; each answer is one line of stdout.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

Numbers = dict[str, Any]
Run = Callable[[Numbers], Numbers]


def load_ours(options: Numbers) -> tuple[Run, Numbers]:
    from multimodal_gen import DiffGenerator

    gen = DiffGenerator.from_pretrained(
        options["model"], device="cpu", dtype=options["dtype"], threads=options["threads"], max_request_cost=10**9
    )

    def run(request: Numbers) -> Numbers:
        ends: list[float] = []
        request, save = _split(request)
        result = gen.generate(
            request.pop("prompt"),
            output_type="latent" if save else "np",
            on_step=lambda _: ends.append(time.perf_counter()),
            **request,
        )
        if save:
            assert result.latents is not None
            np.save(save, result.latents.numpy())
        timings = result.timings
        return {"encode": timings.encode, "decode": timings.decode, "steps": _between(ends)}

    return run, {"dtype": gen.info.dtype, "attention": gen.info.attention_backend}


def load_diffusers(options: Numbers) -> tuple[Run, Numbers]:
    import torch
    from diffusers import WanPipeline

    torch.set_num_threads(options["threads"])
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options["dtype"]]
    # The published advice: a float32 VAE whatever the transformer is.
    pipe = WanPipeline.from_pretrained(options["model"], dtype={"default": dtype, "vae": torch.float32})
    pipe.set_progress_bar_config(disable=True)
    took: Numbers = {}
    pipe.encode_prompt = _timed(pipe.encode_prompt, took, "encode")
    pipe.vae.decode = _timed(pipe.vae.decode, took, "decode")

    def run(request: Numbers) -> Numbers:
        ends: list[float] = []
        request, save = _split(request)
        took.update(encode=0.0, decode=0.0)

        def after_step(_pipe: Any, _step: int, _time: Any, tensors: Numbers) -> Numbers:
            ends.append(time.perf_counter())
            return tensors

        noise = torch.Generator("cpu").manual_seed(request.pop("seed"))
        kind = "latent" if save else "np"
        result = pipe(generator=noise, callback_on_step_end=after_step, output_type=kind, return_dict=False, **request)
        if save:
            np.save(save, result[0].float().numpy())
        return {**took, "steps": _between(ends)}

    return run, {"dtype": options["dtype"], "attention": "diffusers' default"}


def _split(request: Numbers) -> tuple[Numbers, str | None]:
    return {name: value for name, value in request.items() if name != "save"}, request.get("save")


def _timed(call: Callable[..., Any], took: Numbers, name: str) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = call(*arguments, **options)
        took[name] += time.perf_counter() - begin
        return result

    return timed


def _between(ends: list[float]) -> list[float]:
    """The first step stands behind the encoder; our engine reports the last one after decoding."""
    return [later - earlier for earlier, later in pairwise(ends)][: max(1, len(ends) - 2)]


LOADERS = {"ours": load_ours, "diffusers": load_diffusers}


def main() -> None:
    """Load, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print to stdout; the parent must see answers only
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    run, facts = LOADERS[options.pop("kind")](options)
    answers.write(json.dumps(facts) + "\n")
    for line in sys.stdin:
        answer = run(json.loads(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        answers.write(json.dumps({**answer, "peak_gib": peak}) + "\n")


if __name__ == "__main__":
    main()
