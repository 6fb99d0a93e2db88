"""Z-Image on the step contract. Reference: diffusers ZImagePipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import CorruptModel
from multimodal_gen.lora.applied import Applied
from multimodal_gen.memory.layers import LayerList, Track
from multimodal_gen.memory.residency import Memory, Working
from multimodal_gen.nn.lowrank import Overlay
from multimodal_gen.nn.precision import resolve_device, resolve_dtype
from multimodal_gen.parallel.branches import BranchShare, Pair
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.parallel.tensor import shard
from multimodal_gen.pipelines.contract import CacheUse, Conditions, PipelineInfo, Row, whole
from multimodal_gen.pipelines.encoders.causal_text import TRACK as TEXT
from multimodal_gen.pipelines.encoders.causal_text import CausalTextEncoder
from multimodal_gen.pipelines.regions import Regions
from multimodal_gen.pipelines.stages.byte_cache import ByteCache
from multimodal_gen.pipelines.stages.first_block import Begun, Halves, leave_early, looked_at
from multimodal_gen.pipelines.stages.flow_match import SCHEDULER_CLASS, FlowMatchEuler, FlowMatchState
from multimodal_gen.pipelines.stages.guidance import guide
from multimodal_gen.pipelines.stages.solvers import load_solver
from multimodal_gen.pipelines.stages.step_cache import Computed, advance, choose, watched
from multimodal_gen.pipelines.stages.working import OVERHEAD, of_denoising, of_step_cache, tokens_of
from multimodal_gen.pipelines.vaes.kl import KLDecoder
from multimodal_gen.pipelines.zimage.model import Modulation, ZImageConfig, ZImageTransformer
from multimodal_gen.pipelines.zimage.packing import Layout, Rope, Shape, make_layout, pad_count, patchify, unpatchify
from multimodal_gen.pipelines.zimage.sharding import SHARDING
from multimodal_gen.pipelines.zimage.spec import HIGH
from multimodal_gen.pipelines.zimage.weights import RENAMES
from multimodal_gen.request import ImageRequest, ModelCard
from multimodal_gen.weights.checkpoint import verify
from multimodal_gen.weights.loading import WeightTree, construction

TRAIN_STEPS = 1000.0
# Modulation and norms are folded into one table per timestep, apart from the layers' forwards (`Block.fold`).
_FOLDED = (r"modulation\..+", r".+_norm[12]\.weight")
CAPTIONS = Track("captions", (LayerList("context_refiner"),))
STEPS = Track("steps", (LayerList("noise_refiner", _FOLDED), LayerList("layers", _FOLDED)))
LAYOUT_BYTES = MODULATION_BYTES = 64 << 20

Made = TypeVar("Made")  # by a forward, or by its first half


@dataclass(frozen=True)
class Caption:
    """One encoded prompt."""

    tokens: Tensor  # refined, [L, D], L a multiple of 32
    prompt_tokens: int
    dropped: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tokens.nbytes


@dataclass
class Captions(Conditions):
    """Conditions of one request; filled by encode."""

    positive: Tensor | None = None
    negative: Tensor | None = None

    def branches(self, guided: bool) -> list[Tensor]:
        """Refined caption per guidance branch: [positive] or [positive, negative]."""
        assert self.positive is not None
        return [self.positive, self.negative] if guided and self.negative is not None else [self.positive]


@dataclass(frozen=True)
class _Batch:
    """Rows that are computed together."""

    rows: Sequence[Row]
    patches: Sequence[Tensor]  # per row
    captions: Sequence[Sequence[Tensor]]  # per row and branch


@dataclass(frozen=True)
class _Packed:
    """What a forward over some branches of a batch is given besides tokens; filled by `_pack`."""

    rows: list[int]  # of the batch
    joints: list[Pair]  # in the order of the layout
    times: list[Modulation]  # per row
    overlays: list[Overlay | None]  # per row
    layout: Layout


class ZImagePipeline:
    """A loaded Z-Image checkpoint."""

    def __init__(self, card: ModelCard, config: EngineConfig, mesh: Mesh) -> None:
        """Raises: CorruptModel, ConfigError."""
        self.mesh = mesh
        folder = Path(card.path)
        components = verify(folder).components
        self.card = card
        self.deterministic = config.deterministic
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.regions = Regions(config, self.device)
        backend = self.regions.attention(config.attention_backend, mesh)
        settings = ZImageConfig.from_json(json.loads((folder / "transformer" / "config.json").read_text()))
        with construction(torch.device("meta"), self.dtype):
            self.transformer = ZImageTransformer(settings, backend, mesh.sp).eval()
        shard(self.transformer, SHARDING, mesh.tp)
        weights = WeightTree(self.transformer, components["transformer"].files, RENAMES)
        self.memory = memory = Memory(config, self.device, folder, mesh)
        self._here = memory.add("transformer", "denoise", self.transformer, weights, (CAPTIONS, STEPS), high=HIGH)
        files = {name: component.files for name, component in components.items()}
        self.text = CausalTextEncoder(folder, files["text_encoder"], self.device, self.dtype, memory, mesh.tp)
        self.trees = {"transformer": weights, "text_encoder": self.text.weights}
        self.vae = KLDecoder(
            folder / "vae", files["vae"], self.device, self.dtype, memory, config.vae_tiling, mesh.world
        )
        memory.follow(TEXT.name, CAPTIONS.name)
        memory.follow(CAPTIONS.name, STEPS.name)
        memory.load(card, self.dtype, lambda width, height, _frames: self._working(width, height))
        layers = (*self.transformer.noise_refiner, *self.transformer.layers)
        self.regions.apply({"transformer": self.transformer}, layers, memory, by_shape=True)
        self.scheduler = _scheduler(folder)
        self.rope = Rope(settings.axes_dims, settings.rope_theta)
        self.vae_scale = card.size_multiple // settings.patch_size
        self.info = PipelineInfo(
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            attention_backend=backend.name,
            parameters=weights.parameters + self.text.parameters + self.vae.parameters,
        )
        self.cache: ByteCache[Caption] = ByteCache(config.condition_cache_mb << 20, self.info.cache)
        # Requests with the same number of steps meet the same timesteps.
        self.times: ByteCache[Modulation] = ByteCache(MODULATION_BYTES, CacheUse())
        # A batch keeps its composition for many steps.
        self.layouts: ByteCache[Layout] = ByteCache(LAYOUT_BYTES, CacheUse())

    def _working(self, width: int, height: int) -> Working:
        tokens = tokens_of(self.card, width, height)
        config = self.transformer.config
        denoise = of_denoising(tokens, config.dim, self.dtype)
        denoise += of_step_cache(self.card.step_cache, tokens, config.dim, config.patch_dim, self.dtype)
        return {"encode": OVERHEAD, "denoise": denoise, "decode": self.vae.working(width, height)}

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row]) -> None:
        """Fill `row.conditions`; every prompt is encoded by itself, so entries do not depend on their batch."""
        self.memory.begin("encode")
        done: dict[str, Captions] = {}
        for row in rows:
            request = _request(row)
            if request.id not in done:
                done[request.id] = self._encode(request, row.adapters)
            row.conditions = done[request.id]

    def _encode(self, request: ImageRequest, adapters: Applied) -> Captions:
        length = request.max_sequence_length
        positive = self._caption(request.prompt, length, adapters)
        guided = request.guidance_scale > self.card.guidance_threshold
        negative = self._caption(request.negative_prompt or "", length, adapters) if guided else None
        warnings = tuple(
            f"{name} was cut to {request.max_sequence_length} tokens; the last {caption.dropped} were not read"
            for name, caption in (("prompt", positive), ("negative_prompt", negative))
            if caption and caption.dropped
        )
        captions = Captions(
            positive.prompt_tokens,
            warnings,
            positive=positive.tokens,
            negative=negative.tokens if negative else None,
        )
        image = request.width * request.height // self.card.pixels_per_token
        captions.row_tokens = sum(image + pad_count(image) + len(caption) for caption in captions.branches(guided))
        return captions

    def _caption(self, prompt: str, max_length: int, adapters: Applied) -> Caption:
        key = (prompt, max_length, adapters.key(*self.trees))
        return self.cache.get(key, lambda: self._encode_caption(prompt, max_length, adapters))

    def _encode_caption(self, prompt: str, max_length: int, adapters: Applied) -> Caption:
        tokens = self.text.tokenize(prompt, max_length)
        features = self.text.encode(tokens, adapters.overlay("text_encoder")).to(self.dtype)
        length = len(features) + pad_count(len(features))
        turns = self.rope.caption(length).to(self.device)
        with self._here():
            refined = self.transformer.refine_caption(features, turns, adapters.overlay("transformer"))
        return Caption(refined, len(features), tokens.dropped)

    @torch.inference_mode()
    def prepare(self, row: Row) -> None:
        """Noise from a CPU generator and the row's own schedule."""
        request, channels = row.request, self.transformer.config.in_channels
        height, width = request.height // self.vae_scale, request.width // self.vae_scale
        generator = torch.Generator("cpu").manual_seed(row.seed)
        noise = torch.randn((1, channels, height, width), generator=generator, dtype=torch.float32)
        row.latents = noise[0].to(self.device)
        row.sampler = self.scheduler.start_linear(
            request.num_inference_steps, height * width // self.transformer.config.patch_size**2
        )

    @torch.inference_mode()
    def denoise(self, rows: Sequence[Row]) -> None:
        """One step for every row; with `deterministic`, every row in a forward of its own."""
        self.memory.begin("denoise")
        due = [row for row in rows if choose(row, self._kind) != "skip"]
        batches = [[row] for row in due] if self.deterministic else [due] if due else []
        computed = {id(row): made for batch in batches for row, made in self._compute(batch)}
        steps = [advance(row, computed.get(id(row)), self._kind) for row in rows]
        for row, (velocity, history) in zip(rows, steps, strict=True):
            sampler, latents = _state(row)
            if row.request.previews:
                row.clean = sampler.clean(latents, velocity, row.step)
            row.latents, row.sampler = sampler.advance(latents, velocity, row.step)
            row.history = history
            row.step += 1

    def _kind(self, row: Row, step: int) -> bool:
        """Steps with guidance are not extrapolated from those without."""
        return self._guided(row, self._time(row, step))

    def _compute(self, rows: Sequence[Row]) -> list[tuple[Row, Computed]]:
        """Guided dx/dσ of each row, but for those that leave after the first layer."""
        size, dim = self.transformer.config.patch_size, self.transformer.config.dim
        latents = [_state(row)[1] for row in rows]
        patches = [patchify(x.to(self.dtype), size) for x in latents]
        captions = [_captions(row).branches(self._kind(row, row.step)) for row in rows]
        share = BranchShare(tuple(len(branches) for branches in captions), self.mesh.cfg)
        batch, shapes = _Batch(rows, patches, captions), [x.shape for x in patches]
        heads: list[Tensor] = []
        if any(map(watched, rows)):
            looked = [torch.Size((looked_at(len(x)), dim)) for x in patches]
            choices = [choose(row, self._kind) for row in rows]
            halves = Halves(partial(self._forward, batch, self.transformer.begin), partial(self._finish, batch))
            found, heads = leave_early(rows, choices, share, halves, shapes, looked, patches[0])
        else:
            outputs = share.compute(partial(self._forward, batch, self.transformer))
            found = share.exchange(outputs, shapes, patches[0])
        computed = []
        for index, row in enumerate(rows):
            if (index, 0) not in found:
                continue
            flow = found[index, 0].float()
            if (index, 1) in found:
                request = _request(row)
                flow = guide(flow, found[index, 1], request.guidance_scale, request.cfg_normalization)
            _, height, width = latents[index].shape
            velocity = -unpatchify(flow, height, width, size)  # the model predicts clean - noise
            computed.append((row, Computed(velocity, heads[index] if heads else None)))
        return computed

    def _forward(self, batch: _Batch, forward: Callable[..., list[Made]], wanted: Sequence[Pair]) -> dict[Pair, Made]:
        """What a forward of the model, or its first half, makes of these rows under these of their captions."""
        if not wanted:
            return {}
        packed = self._pack(batch, wanted)
        patches = [batch.patches[row] for row in packed.rows]
        captions = [batch.captions[row][branch] for row, branch in packed.joints]
        with self._here():
            made = forward(patches, packed.times, captions, packed.layout, packed.overlays)
        return dict(zip(packed.joints, made, strict=True))

    def _finish(self, batch: _Batch, begun: Mapping[Pair, Begun]) -> dict[Pair, Tensor]:
        """The second half, for what is left."""
        if not begun:
            return {}
        packed = self._pack(batch, list(begun))
        with self._here():
            made = self.transformer.finish(
                [begun[pair] for pair in packed.joints], packed.times, packed.layout, packed.overlays
            )
        return dict(zip(packed.joints, made, strict=True))

    def _pack(self, batch: _Batch, wanted: Sequence[Pair]) -> _Packed:
        # Sorted: one layout, and one recording, for whatever order requests came in.
        shaped = sorted((self._shape(batch, row, wanted), row) for row in {row for row, _ in wanted})
        here, shapes = [row for _, row in shaped], tuple(shape for shape, _ in shaped)
        own = [[pair for pair in wanted if pair[0] == row] for row in here]
        rows = [batch.rows[row] for row in here]
        layout = self.layouts.get(shapes, lambda: make_layout(shapes, self.rope, self.device))
        return _Packed(
            rows=here,
            joints=[own[joint.row][joint.branch] for joint in layout.joints],
            times=[self._modulation(self._time(row, row.step), row.adapters) for row in rows],
            overlays=[row.adapters.overlay("transformer") for row in rows],
            layout=layout,
        )

    def _shape(self, batch: _Batch, row: int, wanted: Sequence[Pair]) -> Shape:
        size, (_, x) = self.transformer.config.patch_size, _state(batch.rows[row])
        lengths = tuple(len(batch.captions[row][branch]) for of, branch in wanted if of == row)
        return Shape(x.shape[1] // size, x.shape[2] // size, lengths)

    def _time(self, row: Row, step: int) -> float:
        """Normalised time of one of the row's steps, exact in float32: 0 noise … 1 clean."""
        return float((TRAIN_STEPS - _state(row)[0].timesteps[step]) / TRAIN_STEPS)

    def _modulation(self, time: float, adapters: Applied) -> Modulation:
        t = torch.tensor([time], dtype=torch.float32, device=self.device)
        overlay = adapters.overlay("transformer")
        return self.times.get((time, adapters.key("transformer")), lambda: self.transformer.modulate(t, overlay))

    def _guided(self, row: Row, time: float) -> bool:
        request = _request(row)
        truncated = request.cfg_truncation is not None and time > request.cfg_truncation
        return request.guidance_scale > self.card.guidance_threshold and not truncated

    def decode(self, row: Row) -> Iterator[np.ndarray | None]:
        """Final latents → uint8 [H, W, 3]."""
        return self._pixels(_state(row)[1])

    @torch.inference_mode()
    def _pixels(self, latents: Tensor) -> Iterator[np.ndarray | None]:
        self.memory.begin("decode")
        for piece in self.vae.decode(latents):
            yield piece
            self.memory.begin("decode")

    @torch.inference_mode()
    def preview(self, row: Row) -> np.ndarray:
        """The clean-image estimate → uint8 [H, W, 3]."""
        assert row.clean is not None, "previews are asked for before the first step"
        return whole(self._pixels(row.clean))

    def release(self, row: Row) -> None:
        """Rows hold nothing outside themselves."""

    def forget(self) -> None:
        """Modulations; encoded prompts stay, within --condition-cache-mb."""
        self.times.clear()
        self.regions.clear()

    def reset(self) -> None:
        """Encoded prompts, modulations, tables of positions."""
        for cache in (self.cache, self.times, self.layouts):
            cache.clear()
        self.regions.clear()
        self.vae.forget()


def _scheduler(folder: Path) -> FlowMatchEuler:
    solver = load_solver(folder / "scheduler")
    if not isinstance(solver, FlowMatchEuler):
        raise CorruptModel(f"scheduler_config.json: this family is built for {SCHEDULER_CLASS}.")
    return solver


def _state(row: Row) -> tuple[FlowMatchState, Tensor]:
    assert isinstance(row.sampler, FlowMatchState), "prepare() comes before denoise()"
    assert row.latents is not None, "prepare() comes before denoise()"
    return row.sampler, row.latents


def _request(row: Row) -> ImageRequest:
    assert isinstance(row.request, ImageRequest), "the card of this family names no video"
    return row.request


def _captions(row: Row) -> Captions:
    assert isinstance(row.conditions, Captions), "encode() comes before denoise()"
    return row.conditions
