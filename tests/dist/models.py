"""Whole runs of a model on every rank of a mesh: the same verbs, in the same order, on each."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multimodal_gen.adapters import AdapterSource, AdapterUse, SetLora, pins_of
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import AdapterError, PeerLost, WeightsUnavailable
from multimodal_gen.lora.manager import LoraManager
from multimodal_gen.parallel.agreement import agree
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.pipelines import registry
from multimodal_gen.pipelines.contract import Pipeline, Row, whole
from multimodal_gen.pipelines.encoders.causal_text import CausalTextEncoder
from multimodal_gen.pipelines.encoders.umt5 import UMT5Encoder
from multimodal_gen.pipelines.wan.pipeline import WanPipeline
from multimodal_gen.pipelines.zimage.pipeline import ZImagePipeline
from multimodal_gen.request import AnyRequest, ModelCard, SamplingParams
from multimodal_gen.resolve import resolve
from tests.support.checkpoints import NEGATIVE, PROMPT
from tests.support.weights import numbers_of

IMAGES: list[dict[str, Any]] = [
    {"width": 64, "height": 80, "guidance_scale": 4.0, "seed": 1},
    {"width": 80, "height": 112, "guidance_scale": 0.0, "seed": 2},
    {"width": 32, "height": 32, "guidance_scale": 2.5, "negative_prompt": NEGATIVE, "cfg_normalization": 0.9},
    {"width": 48, "height": 48, "guidance_scale": 0.0, "prompt": " ".join([PROMPT] * 4)},
    {"width": 112, "height": 80, "guidance_scale": 3.0, "cfg_truncation": 0.5, "num_inference_steps": 3},
]
# Sizes in the model's smallest ones. 5 x 3 x 3 tokens are an odd number.
VIDEOS: list[dict[str, Any]] = [
    {"width": 5, "height": 3, "num_frames": 9, "guidance_scale": 4.0, "seed": 1},
    {"width": 2, "height": 4, "num_frames": 5, "guidance_scale": 1.0, "seed": 2},
    {"width": 4, "height": 3, "num_frames": 1, "guidance_scale": 2.5, "negative_prompt": NEGATIVE},
    {"width": 3, "height": 3, "num_frames": 5, "guidance_scale": 1.0, "prompt": " ".join([PROMPT] * 4)},
    {"width": 5, "height": 3, "num_frames": 9, "guidance_scale": 3.0, "num_inference_steps": 3},
]


def batch_for(card: ModelCard) -> list[dict[str, Any]]:
    """Rows of all kinds: guided and not, of several sizes and lengths, with and without a picture to start from."""
    if card.video is None:
        return IMAGES
    made = []
    for index, params in enumerate(VIDEOS):
        sides = {side: params[side] * card.size_multiple for side in ("width", "height")}
        pictured = card.video.image == "required" or (card.video.image == "optional" and index in (0, 4))
        made.append({**params, **sides, **({"image": _picture(**sides)} if pictured else {})})
    return made


def _picture(width: int, height: int) -> bytes:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Model:
    """A rank's share of a model and its adapters."""

    pipeline: Pipeline
    loras: LoraManager

    @classmethod
    def load(cls, mesh: Mesh, folder: str, **options: Any) -> Model:
        # Resident, unless a test says otherwise: `auto` depends on what else runs on the machine.
        config = EngineConfig(model_path=folder, device="cpu", **{"dtype": "float32", "offload": "none", **options})
        card = registry.describe(config)
        pipeline = registry.load(card, config, mesh)
        targets = registry.find(card.pipeline_class).adapters
        return cls(pipeline, LoraManager(targets, pipeline.trees, config, ranks=mesh.control))

    def request(self, name: str, prompt: str = PROMPT, **params: Any) -> AnyRequest:
        settings = SamplingParams(**{"num_inference_steps": 4, "seed": 0, **params})
        made = resolve(request_id=name, prompt=prompt, params=settings, card=self.pipeline.card, max_cost=10**9)
        return msgspec.structs.replace(made, loras=self.loras.state.active)

    def own(self, request: AnyRequest, *names: str) -> AnyRequest:
        """The request with a list of adapters of its own."""
        uses = [AdapterUse(nickname=name, strength=0.7) for name in names]
        pins = pins_of(uses, self.loras.state, tuple(self.loras.trees))
        return msgspec.structs.replace(request, loras=pins, own_loras=True)

    def run(self, requests: Sequence[AnyRequest]) -> dict[str, Tensor]:
        """Final latents by id; all rows share their forwards."""
        return self.denoise(self.rows(requests))

    def rows(self, requests: Sequence[AnyRequest]) -> list[Row]:
        """Prepared."""
        rows = []
        for request in requests:
            applied = self.loras.equip(self.loras.apply(request))
            self.loras.set_weights(applied.weights)
            rows += [Row(request, index, applied) for index in range(request.n)]
        self.pipeline.encode(rows)
        for row in rows:
            self.pipeline.prepare(row)
        return rows

    def denoise(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """To the end."""
        while going := [row for row in rows if not row.finished]:
            self.pipeline.denoise(going)
        return {f"{row.request.id}/{row.index}": row.latents for row in rows if row.latents is not None}

    def batch(self, name: str) -> dict[str, Tensor]:
        """Rows of all kinds together."""
        return self.run(self.requests(name))

    def requests(self, name: str) -> list[AnyRequest]:
        """With the active adapters."""
        return [self.request(f"{name}-{i}", **params) for i, params in enumerate(batch_for(self.pipeline.card))]

    def set(self, mode: str, **files: str) -> None:
        """Make these adapters the active list."""
        sources = tuple(AdapterSource(nickname=name, path=path) for name, path in files.items())
        uses = tuple(AdapterUse(nickname=name, strength=0.8) for name in files)
        change = SetLora(sources=sources, uses=uses, mode=mode)
        self.loras.commit(self.loras.stager().stage(change), weights_too=True)

    def sums(self) -> dict[str, Tensor]:
        """One number for every weight held here."""
        return {
            f"{tree}/{name}": x.double().sum()
            for tree, weights in self.pipeline.trees.items()
            for name, x in numbers_of(weights.model).items()
        }


def whole_runs(mesh: Mesh, folder: str, zoo: str, plain: str, too_much: str) -> dict[str, Tensor]:
    """Everything of one family: without adapters, merged, beside the weights, mixed, and after a failure.

    Args:
        zoo: a file with updates of every kind, which only merging can apply.
        plain: one with low-rank updates.
        too_much: one that overflows in one corner of one weight.
    """
    model = Model.load(mesh, folder)
    base = model.sums()
    found = model.batch("base")
    model.set("merge", zoo=zoo)
    found |= model.batch("zoo")
    model.set("merge", plain=plain, zoo=zoo)
    found |= model.batch("both")
    merged = model.sums()
    try:
        model.set("merge", plain=plain, too_much=too_much)
    except AdapterError:
        assert model.sums() == merged
    else:
        raise AssertionError("an overflow on one rank was not noticed on this one")
    model.set("dynamic", plain=plain)
    assert model.sums() == base
    found |= model.batch("beside")
    model.set("merge")
    mixed = [model.own(r, "plain") if i % 2 else r for i, r in enumerate(model.requests("mixed"))]
    found |= model.run(mixed)
    assert model.sums() == base
    return found


def under_offload(mesh: Mesh, folder: str, zoo: str, plain: str, **options: Any) -> dict[str, Tensor]:
    """Latents and pixels without adapters, with sets that are swapped in and out, beside the weights and mixed.

    Args:
        zoo, plain: as `whole_runs` takes them.
        options: settings of the engine.
    """
    model = Model.load(mesh, folder, **options)
    found = model.batch("base")
    model.set("merge", zoo=zoo)
    found |= model.batch("zoo")
    model.set("merge", plain=plain, zoo=zoo)
    found |= model.batch("both")
    model.set("dynamic", plain=plain)
    found |= model.batch("beside")
    model.set("merge")
    mixed = [model.own(r, "plain") if i % 2 else r for i, r in enumerate(model.requests("mixed"))]
    found |= model.run(mixed)
    again = model.batch("base")
    assert all(torch.equal(found[name], latents) for name, latents in again.items()), "unmerging is not exact"
    row = Row(model.requests("pixels")[0], 0)
    model.pipeline.prepare(row)
    row.latents = found["base-0/0"]
    found["pixels"] = torch.from_numpy(whole(model.pipeline.decode(row)))
    found["held"] = torch.tensor(model.pipeline.memory.use.device_bytes)
    return found


def encoder_of(model: Model) -> UMT5Encoder | CausalTextEncoder:
    """The text encoder, whose weights adapters may not reach."""
    assert isinstance(model.pipeline, (WanPipeline, ZImagePipeline))
    return model.pipeline.text


def held(model: Model) -> dict[str, int]:
    """Bytes of the weights that this rank holds, per tree."""
    trees = {**model.pipeline.trees, "text_encoder": encoder_of(model).weights}
    return {tree: sum(p.nbytes for p in weights.model.parameters()) for tree, weights in trees.items()}


def one_by_one(mesh: Mesh, folder: str) -> dict[str, Tensor]:
    """`--deterministic`: every row has its own forward, with and without guidance."""
    return Model.load(mesh, folder, deterministic=True).batch("alone")


def in_bf16(mesh: Mesh, folder: str) -> dict[str, Tensor]:
    """The batch in half precision."""
    return Model.load(mesh, folder, dtype="bfloat16").batch("base")


def in_int8(mesh: Mesh, folder: str) -> dict[str, Tensor]:
    """The batch with weights and activations in 8 bits."""
    return Model.load(mesh, folder, quantize="int8").batch("base")


def decoded(mesh: Mesh, folder: str) -> dict[str, Tensor]:
    """Pixels of latents that are larger than a tile, and of some that are not."""
    model = Model.load(mesh, folder, vae_tiling=True)
    pixels = {}
    for index in range(3):
        row = Row(model.requests(f"row-{index}")[1], 0)
        model.pipeline.prepare(row)
        assert row.latents is not None
        channels, *frames = row.latents.shape[:-2]
        # Tiles of the tiny VAEs have 8 latents for images, 32 or 16 for videos.
        sides = ((4, 4), (4, 40), (36, 5))[index] if frames else ((8, 8), (8, 30), (17, 12))[index]
        row.latents = torch.randn(channels, *frames, *sides, generator=torch.Generator().manual_seed(index))
        pixels[str(index)] = torch.from_numpy(whole(model.pipeline.decode(row)))
    return pixels


def loaded(mesh: Mesh, folder: str) -> dict[str, Tensor]:
    """Bytes of the weights that this rank holds, per tree."""
    return {tree: torch.tensor(count) for tree, count in held(Model.load(mesh, folder)).items()}


def memory_of_loading(mesh: Mesh, folder: str, tiny: str) -> dict[str, Tensor]:
    """Bytes of anonymous memory (what is mapped from files left out) that loading adds, at its highest.

    The process must be fresh: one that has freed a model takes the next one's memory from there.
    """
    Model.load(mesh, tiny)  # imports, and what libraries keep
    before, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous())
            done.wait(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model = Model.load(mesh, folder)
    finally:
        done.set()
        watcher.join()
    return {"peak": torch.tensor(peak - before), "held": torch.tensor(sum(held(model).values()))}


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def _failure(work: Callable[[], object]) -> Exception | None:
    try:
        work()
    except PeerLost:
        raise
    except Exception as error:  # noqa: BLE001 - the test looks at what it was
        return error
    return None


def with_caches(mesh: Mesh, folder: str, caches: list[str], **options: Any) -> dict[str, Tensor]:
    """Rows under step caches, all in one batch, and how many of their steps were extrapolated."""
    model = Model.load(mesh, folder, **options)
    requests = []
    for index, cache in enumerate(caches):
        sizes = dict.fromkeys(("width", "height"), (4 + index % 2) * model.pipeline.card.size_multiple)
        frames = {"num_frames": 5} if model.pipeline.card.video else {}
        guidance = (4.0, 1.0, 3.0)[index % 3] if frames or index % 3 != 1 else 0.0
        settings = {"num_inference_steps": 9, "guidance_scale": guidance, "step_cache": cache, "seed": index}
        requests.append(model.request(f"{index}", **sizes, **frames, **settings))
    rows = model.rows(requests)
    found = model.denoise(rows)
    return found | {f"skipped-{row.request.id}": torch.tensor(row.history.skipped) for row in rows}


def one_rank_cannot_read(
    mesh: Mesh, folder: str, guidance_scale: float, cache: str = "none", **options: Any
) -> dict[str, Tensor]:
    """A disk that fails once, in the middle of a run, on the last rank alone; and the run after that."""
    model = Model.load(mesh, folder, condition_cache_mb=0, **options)
    steps = 4 if cache == "none" else 8
    settings: dict[str, Any] = {"num_inference_steps": steps, "step_cache": cache}
    request = model.request("x", width=64, height=64, guidance_scale=guidance_scale, **settings)
    before = model.run([request])
    real, calls = os.preadv, 0

    def failing(*given: Any) -> int:
        nonlocal calls
        calls += 1
        if calls >= 30 and mesh.rank == mesh.degrees.world - 1:
            raise OSError(5, "Input/output error")
        return real(*given)

    row = Row(request, 0)
    os.preadv = failing
    try:
        # After every verb the engine asks all ranks how it went; inside of one, nobody may wait for a rank that failed.
        for verb in (
            lambda: model.pipeline.encode([row]),
            lambda: model.pipeline.prepare(row),
            *[lambda: model.pipeline.denoise([row])] * steps,
        ):
            agree(mesh.control, _failure(verb))
    except WeightsUnavailable:
        pass
    else:
        raise AssertionError("a rank has not learnt that another could not read")
    finally:
        os.preadv = real
    again = model.run([request])
    assert all(torch.equal(again[name], latents) for name, latents in before.items())
    return before
