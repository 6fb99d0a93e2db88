"""Wan on the step contract. Reference: diffusers WanPipeline and WanImageToVideoPipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.config import EngineConfig
from multimodal_gen.memory.layers import LayerList, Track
from multimodal_gen.memory.residency import Memory, Working
from multimodal_gen.nn.precision import resolve_device, resolve_dtype
from multimodal_gen.parallel.branches import BranchShare, Pair
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.parallel.tensor import shard
from multimodal_gen.pipelines.contract import CacheUse, PipelineInfo, Row
from multimodal_gen.pipelines.encoders.clip_vision import ClipVisionEncoder
from multimodal_gen.pipelines.encoders.umt5 import TRACK as TEXT
from multimodal_gen.pipelines.encoders.umt5 import UMT5Encoder
from multimodal_gen.pipelines.regions import Regions
from multimodal_gen.pipelines.stages.byte_cache import ByteCache
from multimodal_gen.pipelines.stages.first_block import Halves, leave_early, looked_at
from multimodal_gen.pipelines.stages.guidance import extrapolate
from multimodal_gen.pipelines.stages.solvers import load_solver, state_of
from multimodal_gen.pipelines.stages.step_cache import Computed, advance, choose, watched
from multimodal_gen.pipelines.stages.working import OVERHEAD, of_denoising, of_step_cache, tokens_of
from multimodal_gen.pipelines.vaes.wan import WanVae
from multimodal_gen.pipelines.wan.conditions import (
    Prompt,
    Start,
    VideoConditions,
    digest,
    first_frame_mask,
    open_picture,
    pixels_of,
)
from multimodal_gen.pipelines.wan.config import WanConfig
from multimodal_gen.pipelines.wan.model import Context, Modulation, WanTransformer
from multimodal_gen.pipelines.wan.packing import Layout, Rope, Shape, make_layout, patchify, unpatchify
from multimodal_gen.pipelines.wan.sharding import sharding
from multimodal_gen.pipelines.wan.spec import EXPERTS, HIGH, Experts
from multimodal_gen.pipelines.wan.weights import IGNORED, RENAMES
from multimodal_gen.request import ModelCard, VideoRequest
from multimodal_gen.weights.checkpoint import Checkpoint, read_json, verify
from multimodal_gen.weights.loading import WeightTree, construction

LAYOUT_BYTES = MODULATION_BYTES = 256 << 20

Given = TypeVar("Given")  # to a forward, or to its second half
Made = TypeVar("Made")  # by a forward, or by its first half


class WanPipeline:
    """A loaded Wan checkpoint: one transformer, or two experts for noisy and for clean steps."""

    def __init__(self, card: ModelCard, config: EngineConfig, mesh: Mesh) -> None:
        """Raises: CorruptModel, ConfigError."""
        self.mesh = mesh
        folder = Path(card.path)
        checkpoint = verify(folder)
        self.card = card
        self.deterministic = config.deterministic
        self.keep_text = config.text_kv_cache
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.experts = Experts.of(checkpoint)
        self.regions = Regions(config, self.device)
        self.backend = self.regions.attention(config.attention_backend, mesh)
        self.memory = memory = Memory(config, self.device, folder, mesh)
        self.trees: dict[str, WeightTree] = {}
        self.transformers: dict[str, WanTransformer] = {}
        for name in self.experts.names:
            self._load_expert(name, checkpoint)
        first = self.transformers[EXPERTS[0]].config
        self.rope = Rope(first)
        self.patch = first.patch_size
        files = {name: component.files for name, component in checkpoint.components.items()}
        self.text = UMT5Encoder(folder, files["text_encoder"], self.device, self.dtype, memory, mesh.tp)
        self.images: ClipVisionEncoder | None = None
        if first.image_dim is not None:
            self.images = ClipVisionEncoder(folder, files["image_encoder"], self.device, self.dtype, memory)
        self.vae = WanVae(folder / "vae", files["vae"], self.device, memory, config.vae_tiling, mesh.world)
        memory.follow(TEXT.name, self.experts.names[0])
        memory.load(card, self.dtype, self._working)
        blocks = [block for transformer in self.transformers.values() for block in transformer.blocks]
        self.regions.apply(self.transformers, blocks, memory, by_shape=False)  # they read texts
        self.solver = load_solver(folder / "scheduler")
        self.vae_scale = card.size_multiple // self.patch[1]
        self.latent_channels: int = len(self.vae.mean)
        # What the noise lacks of the transformer's input comes from the picture.
        self.concatenates = first.in_channels > self.latent_channels
        self.info = PipelineInfo(
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            attention_backend=self.backend.name,
            parameters=self._count(),
        )
        self.prompts: ByteCache[Prompt] = ByteCache(config.condition_cache_mb << 20, self.info.cache)
        self.starts: ByteCache[Start] = ByteCache(config.condition_cache_mb << 20, CacheUse())
        # Rows of a request start at different steps and share what its texts were made into; the last one frees it.
        self.conditions: WeakValueDictionary[str, VideoConditions] = WeakValueDictionary()
        # Requests with the same schedule meet the same timesteps; a batch keeps its composition for many steps.
        self.times: ByteCache[Modulation] = ByteCache(MODULATION_BYTES, CacheUse())
        self.layouts: ByteCache[Layout] = ByteCache(LAYOUT_BYTES, CacheUse())

    def _load_expert(self, name: str, checkpoint: Checkpoint) -> None:
        relative = f"{name}/config.json"
        settings = WanConfig.from_json(read_json(checkpoint.folder, relative), relative)
        with construction(torch.device("meta"), self.dtype):
            transformer = WanTransformer(settings, self.backend, self.mesh.sp).eval()
        shard(transformer, sharding(settings), self.mesh.tp)
        tree = self.trees[name] = WeightTree(transformer, checkpoint.components[name].files, RENAMES, IGNORED)
        track = Track(name, (LayerList("blocks", (r"scale_shift_table",)),))  # the table is read once per timestep
        self.memory.add(name, "denoise", transformer, tree, (track,), high=HIGH)
        self.transformers[name] = transformer

    def _count(self) -> int:
        own = sum(tree.parameters for tree in self.trees.values())
        return own + self.text.parameters + self.vae.parameters + (self.images.parameters if self.images else 0)

    def _working(self, width: int, height: int, frames: int) -> Working:
        tokens = tokens_of(self.card, width, height, frames)
        first = self.transformers[EXPERTS[0]]
        denoise = of_denoising(tokens, first.config.dim, self.dtype)
        denoise += of_step_cache(self.card.step_cache, tokens, first.config.dim, first.out_dim, self.dtype)
        decode = self.vae.working(width, height)
        starts = self.card.video is not None and self.card.video.image != "none"
        return {"encode": decode if starts else OVERHEAD, "denoise": denoise, "decode": decode}

    # --- encode -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row]) -> None:
        """Fill `row.conditions`; every prompt is encoded by itself, so entries do not depend on their batch."""
        self.memory.begin("encode")
        for row in rows:
            request = _request(row)
            known = self.conditions.get(request.id)
            if known is None or known.request is not request:
                known = self.conditions[request.id] = self._encode(request)
            row.conditions = known

    def _encode(self, request: VideoRequest) -> VideoConditions:
        length = request.max_sequence_length
        texts = {"prompt": request.prompt}
        if request.guidance_scale > self.card.guidance_threshold:
            texts["negative_prompt"] = request.negative_prompt or ""
        branches = {name: self._prompt(text, length) for name, text in texts.items()}
        warnings = tuple(
            f"{name} was cut to {length} tokens; the last {prompt.dropped} were not read"
            for name, prompt in branches.items()
            if prompt.dropped
        )
        start = None if request.image is None else self._start(request, request.image)
        return VideoConditions(
            len(branches["prompt"].features), warnings, request=request, branches=tuple(branches.values()), start=start
        )

    def _prompt(self, text: str, max_length: int) -> Prompt:
        return self.prompts.get((text, max_length), lambda: self._encode_prompt(text, max_length))

    def _encode_prompt(self, text: str, max_length: int) -> Prompt:
        tokens = self.text.tokenize(text, max_length)
        features = self.text.encode(tokens).to(self.dtype)
        return Prompt(features, max_length - len(features), tokens.dropped)

    def _start(self, request: VideoRequest, png: bytes) -> Start:
        key = (digest(png), request.width, request.height, request.num_frames if self.concatenates else 1)
        return self.starts.get(key, lambda: self._encode_start(request, png))

    def _encode_start(self, request: VideoRequest, png: bytes) -> Start:
        image = open_picture(png)
        pixels = pixels_of(image, request.width, request.height)
        if not self.concatenates:
            return Start(self.vae.encode(pixels), None)
        rest = pixels.new_zeros(3, request.num_frames - 1, request.height, request.width)
        latents = self.vae.encode(torch.cat([pixels, rest], dim=1))
        _, _, height, width = latents.shape
        mask = first_frame_mask(request.num_frames, height, width, self._frames_per_latent)
        tokens = None if self.images is None else self.images.encode(image).to(self.dtype)
        return Start(torch.cat([mask.to(latents), latents]), tokens)

    @property
    def _frames_per_latent(self) -> int:
        assert self.card.video is not None, "the card of this family describes videos"
        return self.card.video.frames_per_latent

    # --- prepare and denoise ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prepare(self, row: Row) -> None:
        """Noise from a CPU generator and the row's own schedule."""
        request = _request(row)
        frames = (request.num_frames - 1) // self._frames_per_latent + 1
        height, width = request.height // self.vae_scale, request.width // self.vae_scale
        generator = torch.Generator("cpu").manual_seed(row.seed)
        noise = torch.randn((1, self.latent_channels, frames, height, width), generator=generator, dtype=torch.float32)
        row.latents = noise[0].to(self.device)
        row.sampler = self.solver.start(request.num_inference_steps, request.flow_shift)

    @torch.inference_mode()
    def denoise(self, rows: Sequence[Row]) -> None:
        """One step for every row; rows of one expert share a forward, with `deterministic` every row has its own."""
        self.memory.begin("denoise")
        due = [row for row in rows if choose(row, self._kind) != "skip"]
        batches = [[row] for row in due] if self.deterministic else self._by_expert(due)
        computed: dict[int, Computed] = {}
        for index, batch in enumerate(batches):
            self._foresee(batch, batches[index + 1 :], rows)
            computed |= {id(row): made for row, made in self._compute(batch)}
        steps = [advance(row, computed.get(id(row)), self._kind) for row in rows]
        advanced = [state_of(row).advance(_latents(row), v, row.step) for row, (v, _) in zip(rows, steps, strict=True)]
        for row, (latents, sampler), (_, history) in zip(rows, advanced, steps, strict=True):
            row.latents, row.sampler, row.history = latents, sampler, history
            row.step += 1
            if row.finished:
                row.latents = self._held(row, latents)

    def _by_expert(self, rows: Sequence[Row]) -> list[list[Row]]:
        batches = [[row for row in rows if self._expert(row) == name] for name in self.experts.names]
        return [batch for batch in batches if batch]

    def _expert(self, row: Row) -> str:
        return self._kind(row, row.step)

    def _kind(self, row: Row, step: int) -> str:
        """What one expert makes is not extrapolated from what the other made."""
        return self.experts.at(_time(row, step))

    def _foresee(self, batch: Sequence[Row], later: Sequence[Sequence[Row]], rows: Sequence[Row]) -> None:
        """What is fetched while this batch's last layers compute: the next forward, maybe of the other expert."""
        if later:
            following = self._expert(later[0][0])
        else:
            ahead = {self._kind(row, row.step + 1) for row in rows if row.step + 1 < row.request.num_inference_steps}
            following = next((name for name in self.experts.names if name in ahead), self.experts.names[0])
        self.memory.follow(self._expert(batch[0]), following)

    def _compute(self, rows: Sequence[Row]) -> list[tuple[Row, Computed]]:
        """Guided dx/dσ [C, f, h, w] of each row of one expert, but for those that leave after the first block."""
        name = self._expert(rows[0])
        shapes = [self._shape(row) for row in rows]
        patches = [patchify(self._input(row), self.patch).to(self.dtype) for row in rows]
        share = BranchShare(tuple(len(_conditions(row).branches) for row in rows), self.mesh.cfg)
        transformer, forward = self.transformers[name], partial(self._forward, name, rows, shapes)
        sizes = [torch.Size((s.tokens, transformer.out_dim)) for s in shapes]
        heads: list[Tensor] = []

        def given(pairs: list[Pair]) -> dict[Pair, Tensor]:
            return {pair: patches[pair[0]] for pair in pairs}

        if any(map(watched, rows)):
            halves = Halves(
                lambda mine: forward(transformer.begin, given(mine)), lambda begun: forward(transformer.finish, begun)
            )
            looked = [torch.Size((looked_at(s.tokens), transformer.config.dim)) for s in shapes]
            choices = [choose(row, self._kind) for row in rows]
            found, heads = leave_early(rows, choices, share, halves, sizes, looked, patches[0])
        else:
            found = share.exchange(share.compute(lambda mine: forward(transformer, given(mine))), sizes, patches[0])
        computed = []
        for index, (row, shape) in enumerate(zip(rows, shapes, strict=True)):
            if (index, 0) not in found:
                continue
            flow = found[index, 0].float()
            if (index, 1) in found:
                flow = extrapolate(flow, found[index, 1], self._guidance(row, name))
            computed.append((row, Computed(unpatchify(flow, shape, self.patch), heads[index] if heads else None)))
        return computed

    def _forward(
        self,
        name: str,
        rows: Sequence[Row],
        shapes: Sequence[Shape],
        forward: Callable[..., list[Made]],
        given: Mapping[Pair, Given],
    ) -> dict[Pair, Made]:
        """What a forward of an expert, or a half of it, makes of these rows under these of their prompts."""
        if not given:
            return {}
        layout = self._layout([(shapes[row], row, branch) for row, branch in given])
        with self.memory.at(name):
            outputs = forward(
                [given[s.row, s.branch] for s in layout.sequences],
                [self._modulation(name, rows[layout.sequences[i].row], still) for i, _, still in layout.pieces],
                [self._context(name, rows[s.row], s.branch) for s in layout.sequences],
                layout,
                [rows[s.row].adapters.overlay(name) for s in layout.sequences],
            )
        return {(s.row, s.branch): out for s, out in zip(layout.sequences, outputs, strict=True)}

    def _shape(self, row: Row) -> Shape:
        _, *sides = _latents(row).shape
        frames, height, width = (side // size for side, size in zip(sides, self.patch, strict=True))
        held = _conditions(row).start is not None and not self.concatenates
        return Shape(frames, height, width, still=height * width if held else 0)

    def _layout(self, wanted: Sequence[tuple[Shape, int, int]]) -> Layout:
        key = tuple((s.frames, s.height, s.width, s.still, row, branch) for s, row, branch in wanted)
        return self.layouts.get(key, lambda: make_layout(wanted, self.rope, self.device))

    def _input(self, row: Row) -> Tensor:
        """What the transformer sees of a row: its latents, and what its picture adds."""
        start = _conditions(row).start
        if start is not None and self.concatenates:
            return torch.cat([_latents(row), start.latents])
        return self._held(row, _latents(row))

    def _held(self, row: Row, latents: Tensor) -> Tensor:
        """The latents with the clean first frame, for models that are given it in place of noise."""
        start = _conditions(row).start
        if start is None or self.concatenates:
            return latents
        return torch.cat([start.latents, latents[:, 1:]], dim=1)

    def _modulation(self, name: str, row: Row, still: bool) -> Modulation:
        time = 0.0 if still else _time(row, row.step)
        t = torch.tensor([time], dtype=torch.float32, device=self.device)
        overlay = row.adapters.overlay(name)
        key = (name, time, row.adapters.key(name))
        return self.times.get(key, lambda: self.transformers[name].modulate(t, overlay))

    def _context(self, name: str, row: Row, branch: int) -> Context:
        conditions = _conditions(row)
        prompt, start = conditions.branches[branch], conditions.start
        image = None if start is None else start.tokens
        key = (name, row.adapters.key(name), branch)
        read, overlay, keep = self.transformers[name].read, row.adapters.overlay(name), self.keep_text
        return conditions.context(key, lambda: read(prompt.features, prompt.pads, image, overlay, keep=keep), keep=keep)

    def _guidance(self, row: Row, name: str) -> float:
        request = _request(row)
        second = request.guidance_scale_2
        return request.guidance_scale if name == EXPERTS[0] or second is None else second

    # --- decode -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decode(self, row: Row) -> Iterator[np.ndarray | None]:
        """Final latents → uint8 [f, H, W, 3], a latent frame at a time."""
        self.memory.begin("decode")
        for frames in self.vae.decode(_latents(row)):
            yield frames
            self.memory.begin("decode")

    def preview(self, row: Row) -> np.ndarray:
        """The card promises none."""
        raise AssertionError("videos have no previews")

    def release(self, row: Row) -> None:
        """Texts of a request are freed with its last row; rows hold nothing outside themselves."""

    def forget(self) -> None:
        """Modulations; encoded prompts and pictures stay, within --condition-cache-mb."""
        self.times.clear()
        self.regions.clear()

    def reset(self) -> None:
        """Encoded prompts and pictures, modulations, tables of positions, what the layers made of texts."""
        for cache in (self.prompts, self.starts, self.times, self.layouts):
            cache.clear()
        self.regions.clear()
        for conditions in self.conditions.values():
            conditions.contexts.clear()


def _request(row: Row) -> VideoRequest:
    assert isinstance(row.request, VideoRequest), "the card of this family names videos"
    return row.request


def _conditions(row: Row) -> VideoConditions:
    assert isinstance(row.conditions, VideoConditions), "encode() comes before denoise()"
    return row.conditions


def _latents(row: Row) -> Tensor:
    assert row.latents is not None, "prepare() comes before denoise()"
    return row.latents


def _time(row: Row, step: int) -> float:
    """Timestep of one of the row's steps: 1000 noise … 0 clean."""
    return float(state_of(row).timesteps[step])
