"""One side of `offload.py`: loads a Z-Image in one of the modes, then obeys. Started by `_common.Side`, not by hand.

argv[1] and each line of stdin are JSON objects; each answer is one line of stdout. What fails is answered as
{"error": ...}, for a mode that cannot do something is a result. Commands (`do`):
    steps   denoise; begin and ends of the steps on the machine's monotonic clock, and what moved per step
    swap    to the adapter, as users of this side would
    facts   where the weights are, in bytes
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Numbers = dict[str, Any]
STRENGTH = 0.8


class Ours:
    """DiffGenerator; `mode` are its offload settings."""

    def __init__(self, model: str, mode: Numbers, threads: int, dtype: str, place: str) -> None:
        from multimodal_gen import DiffGenerator

        self.gen = DiffGenerator.from_pretrained(
            model, device="cpu", dtype=dtype, threads=threads, max_request_cost=10**9, **mode
        )

    @property
    def memory(self) -> Any:
        return self.gen._engine.core.pipeline.memory

    def swap(self, adapter: str) -> None:
        self.gen.set_lora("adapter", adapter, strength=STRENGTH)

    def run(self, request: Numbers, on_step: Callable[[], None]) -> np.ndarray:
        prompt = request.pop("prompt")
        result = self.gen.generate(prompt, output_type="latent", on_step=lambda _: on_step(), **request)
        assert result.latents is not None
        return result.latents.numpy()

    def moved(self) -> Numbers:
        use = self.memory.use
        return {"moved_bytes": use.moved_bytes, "stall_seconds": use.stall_seconds}

    def facts(self) -> Numbers:
        parts = [{"name": s.name, "rest": s.rest, "layers": list(s.layers)} for s in self.memory.sizes()]
        plan = self.memory.plan
        shares = {name: (share.residency, len(share.resident_layers)) for name, share in plan.shares.items()}
        return {"parts": parts, "shares": shares, "slots": plan.slots, "slot_bytes": plan.slot_bytes}


class Theirs:
    """diffusers' ZImagePipeline; `mode` are arguments of `apply_group_offloading`, or nothing."""

    def __init__(self, model: str, mode: Numbers, threads: int, dtype: str, place: str) -> None:
        import torch
        from diffusers import ZImagePipeline
        from diffusers.hooks import apply_group_offloading
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from multimodal_gen.nn.precision import DTYPES

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.pipe = ZImagePipeline.from_pretrained(model, dtype=DTYPES[dtype])
        self.pipe.set_progress_bar_config(disable=True)
        mode, disk = dict(mode), mode.get("disk", False)
        mode.pop("disk", None)
        for name in ("transformer", "text_encoder", "vae") if mode else ():
            # A folder for each: in a common one, files of one component are taken for those of another.
            folder = {"offload_to_disk_path": str(Path(place, name))} if disk else {}
            part = getattr(self.pipe, name)
            apply_group_offloading(part, onload_device="cpu", offload_device="cpu", **mode, **folder)

    def swap(self, adapter: str) -> None:
        self.pipe.load_lora_weights(adapter, adapter_name="adapter")
        self.pipe.set_adapters(["adapter"], [STRENGTH])

    def run(self, request: Numbers, on_step: Callable[[], None]) -> np.ndarray:
        import torch

        def after(_pipe: Any, _step: int, _time: Any, tensors: Numbers) -> Numbers:
            on_step()
            return tensors

        noise = torch.Generator().manual_seed(request.pop("seed"))
        latents = self.pipe(
            generator=noise, output_type="latent", return_dict=False, callback_on_step_end=after, **request
        )[0]
        return latents.float().numpy()

    def moved(self) -> Numbers:
        return {}

    def facts(self) -> Numbers:
        return {}


class Imports:
    """What a process needs before it has a model: the same imports as ours."""

    def __init__(self, model: str, **_: Any) -> None:
        from accelerate import init_empty_weights
        from diffusers import AutoencoderKL
        from transformers import AutoConfig, AutoModel, AutoTokenizer, Qwen3Model

        from multimodal_gen.config import EngineConfig
        from multimodal_gen.engine import core, local
        from multimodal_gen.pipelines import registry
        from multimodal_gen.pipelines.zimage import pipeline

        card = registry.describe(EngineConfig(model_path=model))
        self.used = core, local, pipeline, card
        self.libraries = init_empty_weights, AutoencoderKL, AutoConfig, AutoModel, AutoTokenizer, Qwen3Model

    def facts(self) -> Numbers:
        status = Path("/proc/self/status").read_text().splitlines()
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
        return {"data_bytes": data}


KINDS = {"ours": Ours, "diffusers": Theirs, "imports": Imports}


def main() -> None:
    """Load, then obey until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print to stdout; the parent must see answers only
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    adapter = options.pop("adapter", "")
    try:
        pipe = KINDS[options.pop("kind")](**options)
    except Exception as error:  # noqa: BLE001 - whatever another library raises is what its mode is worth
        answers.write(json.dumps(_failure(error)) + "\n")
        return
    answers.write(json.dumps({"loaded_at": time.perf_counter()}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = obey(pipe, command, adapter)
        except Exception as error:  # noqa: BLE001 - as above
            answer = _failure(error)
        answers.write(json.dumps(answer) + "\n")


def obey(pipe: Any, command: Numbers, adapter: str) -> Numbers:
    """One command."""
    do = command.pop("do")
    if do == "facts":
        return dict(pipe.facts())
    if do == "swap":
        begin = time.perf_counter()
        pipe.swap(adapter)
        return {"seconds": time.perf_counter() - begin}
    assert do == "steps", do
    save, ends, moved = command.pop("save", None), list[float](), list[Numbers]()

    def on_step() -> None:
        ends.append(time.perf_counter())
        moved.append(pipe.moved())

    begin, before = time.perf_counter(), pipe.moved()
    latents = pipe.run(command, on_step)
    if save:
        np.save(save, latents)
    per_step = {name: (moved[-1][name] - before[name]) / len(moved) for name in before}
    return {"begin": begin, "ends": ends, **per_step}


def _failure(error: Exception) -> Numbers:
    text = " ".join(str(error).split())
    return {"error": f"{type(error).__name__}: {text[:200]}"}


if __name__ == "__main__":
    main()
