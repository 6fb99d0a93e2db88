"""One side of a comparison: loads a pipeline, then answers requests. Started by `_common.Side`, not by hand.

argv[1] and each line of stdin are JSON objects (`Options`, `Request`); each answer is one line of stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Options:
    """What to load."""

    kind: str
    """ours: DiffGenerator; diffusers: ZImagePipeline; compiled: that under torch.compile; verbs: our pipeline without
    the engine around it"""
    model: str
    """diffusers folder or bundled name"""
    threads: int
    dtype: str = "auto"
    """of the weights; "auto" is ours alone, so that the other side can be told what it became"""
    keep_freed: bool = False
    """whether the allocator keeps freed memory; `ours` always does, as it does for its users"""


@dataclass(frozen=True)
class Request:
    """One picture."""

    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    save: str | None = None
    """.npy file for the picture: uint8 [H, W, 3]"""
    noise: str | None = None
    """.npy file with what `seed` draws, for a side without torch"""


@dataclass(frozen=True)
class Answer:
    """`ends`: clock at the end of each step."""

    picture: np.ndarray
    ends: list[float]


Run = Callable[[Request], Answer]


def load_ours(options: Options) -> tuple[Run, dict[str, Any]]:
    from multimodal_gen import DiffGenerator

    gen = DiffGenerator.from_pretrained(options.model, device="cpu", dtype=options.dtype, threads=options.threads)

    def run(request: Request) -> Answer:
        ends: list[float] = []
        result = gen.generate(
            request.prompt,
            seed=request.seed,
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            on_step=lambda _: ends.append(time.perf_counter()),
        )
        return Answer(np.asarray(result.images[0]), ends)

    return run, {"dtype": gen.info.dtype, "attention": gen.info.attention_backend}


def load_diffusers(options: Options) -> tuple[Run, dict[str, Any]]:
    return _diffusers(options, lambda transformer: None)


def load_compiled(options: Options) -> tuple[Run, dict[str, Any]]:
    """torch.compile of the whole transformer, as diffusers advises; it compiles in the first requests."""
    return _diffusers(options, lambda transformer: transformer.compile())


def _diffusers(options: Options, prepare: Callable[[Any], None]) -> tuple[Run, dict[str, Any]]:
    import torch
    from diffusers import ZImagePipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from multimodal_gen.nn.precision import DTYPES

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    if options.keep_freed:
        _keep_freed_memory()
    pipe = ZImagePipeline.from_pretrained(_folder(options.model), dtype=DTYPES[options.dtype])
    pipe.set_progress_bar_config(disable=True)
    prepare(pipe.transformer)

    def run(request: Request) -> Answer:
        ends: list[float] = []

        def after_step(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            ends.append(time.perf_counter())
            return tensors

        result = pipe(
            request.prompt,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            callback_on_step_end=after_step,
        )
        return Answer(np.asarray(result.images[0]), ends)

    return run, {"dtype": options.dtype, "attention": "diffusers' default"}


def load_verbs(options: Options) -> tuple[Run, dict[str, Any]]:
    import torch

    from multimodal_gen.config import EngineConfig
    from multimodal_gen.pipelines import registry
    from multimodal_gen.pipelines.contract import Row
    from multimodal_gen.request import SamplingParams
    from multimodal_gen.resolve import resolve

    torch.set_num_threads(options.threads)
    if options.keep_freed:
        _keep_freed_memory()
    config = EngineConfig(model_path=options.model, device="cpu", dtype=options.dtype)  # type: ignore[arg-type]
    card = registry.describe(config)
    pipeline = registry.load(card, config)

    def run(request: Request) -> Answer:
        params = SamplingParams(
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            seed=request.seed,
        )
        settled = resolve(
            request_id="bench", prompt=request.prompt, params=params, card=card, max_cost=config.max_request_cost
        )
        row, ends = Row(settled, 0), []
        pipeline.encode([row])
        pipeline.prepare(row)
        while not row.finished:
            pipeline.denoise([row])
            ends.append(time.perf_counter())
        return Answer(pipeline.decode([row])[0], ends)

    return run, {"dtype": pipeline.info.dtype, "attention": pipeline.info.attention_backend}


LOADERS = {"ours": load_ours, "diffusers": load_diffusers, "compiled": load_compiled, "verbs": load_verbs}


def _folder(model: str) -> str:
    from multimodal_gen.weights.hub import ASSETS

    bundled = ASSETS / model
    return str(bundled) if bundled.is_dir() else model


def _keep_freed_memory() -> None:
    from multimodal_gen.memory.host import keep_freed_memory

    if not keep_freed_memory():
        raise SystemExit("this libc has no mallopt: --tune-peer and host_allocator need Linux with glibc")


def main() -> None:
    """Load, then answer until stdin ends."""
    # Libraries print to stdout; the parent must see answers only.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options = Options(**json.loads(sys.argv[1]))
    run, facts = LOADERS[options.kind](options)
    answers.write(json.dumps(facts) + "\n")
    for line in sys.stdin:
        request = Request(**json.loads(line))
        begin = time.perf_counter()
        answer = run(request)
        seconds = time.perf_counter() - begin
        if request.save:
            np.save(request.save, answer.picture)
        between = [later - earlier for earlier, later in zip(answer.ends, answer.ends[1:], strict=False)]
        # The first step stands behind the encoder; the engine reports the last one after decoding.
        answers.write(json.dumps({"seconds": seconds, "step_seconds": between[:-1]}) + "\n")


if __name__ == "__main__":
    main()
