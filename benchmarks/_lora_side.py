"""One side of `lora.py`: loads the medium model, then switches adapters and runs steps. Started by `_common.Side`.

argv[1] and each line of stdin are JSON objects; each answer is one line of stdout. Commands (`do`):
    load    from files to merged weights, nothing known of the adapters before
    merge   the same adapters, known already, to merged weights
    unmerge back to the base weights
    beside  the adapters unmerged
    step    seconds of one denoising step in the present state, median
    facts   whether the base weights are what they were; peak memory
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from multimodal_gen.nn.linear import FusedLinear, Linear

STRENGTHS = [0.8, 0.5, -0.3]
NAMES = ["a", "b", "c"]
PROMPT = "a red apple on a blue background"


class Ours:
    """DiffGenerator."""

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        from multimodal_gen import DiffGenerator

        self.gen = DiffGenerator.from_pretrained(model, device="cpu", dtype=dtype, threads=threads)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        model = self.gen._engine.core.pipeline.trees["transformer"].model
        for name, module in model.named_modules():
            for own, tensor in module.named_parameters(name, recurse=False):
                packed = (
                    module.packed if own.endswith(".weight") and isinstance(module, (Linear, FusedLinear)) else None
                )
                yield own, tensor if packed is None else packed.plain()

    def prepare_load(self) -> None:
        """Forget the adapters, untimed."""
        self.gen.set_lora([])
        for info in self.gen.list_loras().loaded:
            self.gen.unload_lora(info.nickname)

    def load(self, files: Sequence[str]) -> None:
        self.gen.set_lora(NAMES, list(files), strength=STRENGTHS, merge_mode="merge")

    def merge(self) -> None:
        self.gen.set_lora(NAMES, strength=STRENGTHS, merge_mode="merge")

    def unmerge(self) -> None:
        self.gen.unmerge_lora_weights()

    def beside(self) -> None:
        self.gen.set_lora(NAMES, strength=STRENGTHS, merge_mode="dynamic")

    def run(self, side: int, steps: int, on_step: Callable[[], None]) -> None:
        self.gen.generate(
            PROMPT,
            seed=1,
            width=side,
            height=side,
            num_inference_steps=steps,
            guidance_scale=3.0,
            output_type="latent",
            on_step=lambda _: on_step(),
        )


class Theirs:
    """diffusers' ZImagePipeline with peft."""

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        from diffusers import ZImagePipeline

        from multimodal_gen.nn.precision import DTYPES

        torch.set_num_threads(threads)
        self.pipe = ZImagePipeline.from_pretrained(model, dtype=DTYPES[dtype])
        self.pipe.set_progress_bar_config(disable=True)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.pipe.transformer.state_dict().items():
            if "lora_" not in name:
                yield name.replace(".base_layer", ""), tensor

    def prepare_load(self) -> None:
        self.pipe.unload_lora_weights()

    def load(self, files: Sequence[str]) -> None:
        for name, file in zip(NAMES, files, strict=True):
            self.pipe.load_lora_weights(file, adapter_name=name)
        self.merge()

    def merge(self) -> None:
        self.pipe.set_adapters(NAMES, STRENGTHS)
        self.pipe.fuse_lora(components=["transformer"])

    def unmerge(self) -> None:
        self.pipe.unfuse_lora(components=["transformer"])

    def beside(self) -> None:
        self.pipe.set_adapters(NAMES, STRENGTHS)

    def run(self, side: int, steps: int, on_step: Callable[[], None]) -> None:
        def after(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return tensors

        self.pipe(
            PROMPT,
            generator=torch.Generator().manual_seed(1),
            width=side,
            height=side,
            num_inference_steps=steps,
            guidance_scale=3.0,
            output_type="latent",
            callback_on_step_end=after,
        )


def checksum(weights: Iterator[tuple[str, torch.Tensor]]) -> str:
    """Of the base weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Load, then obey until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    kind = {"ours": Ours, "diffusers": Theirs}[options.pop("kind")]
    files = options.pop("files")
    pipe = kind(**options)
    base = checksum(pipe.weights())
    answers.write(json.dumps({"loaded_mb": _peak_mb()}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "step":
            ends: list[float] = []
            pipe.run(command["side"], command["steps"], lambda ends=ends: ends.append(time.perf_counter()))
            between = [later - earlier for earlier, later in pairwise(ends)]
            answer: dict[str, Any] = {"seconds": median(between[:-1])}  # the first and the last step do more
        elif do == "facts":
            answer = {"base_is_exact": checksum(pipe.weights()) == base, "peak_mb": _peak_mb()}
        else:
            if do == "load":
                pipe.prepare_load()
            switch = {
                "load": lambda: pipe.load(files),
                "merge": pipe.merge,
                "unmerge": pipe.unmerge,
                "beside": pipe.beside,
            }
            work = switch[do]
            begin = time.perf_counter()
            work()
            answer = {"seconds": time.perf_counter() - begin}
        answers.write(json.dumps(answer) + "\n")


def _peak_mb() -> float:
    """Of this program alone: `getrusage` would count the parent's peak, which a child inherits."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
