"""The Z-Image diffusion transformer (Z-Image Team, 2025; reference: diffusers ZImageTransformer2DModel).

Shapes: T packed tokens of all segments, S segments, R rows (images), D model width, H heads, L tokens of one segment.
Ranks that share a sequence (`sequence`) hold a slice of each packed batch, and S are the segments in it; ranks that
share weights hold some of the heads and of the hidden units.

The caption tower does not see the timestep, so `refine_captions` runs once per prompt. Image and caption sequences are
each padded to a multiple of 32 with learned pad tokens that take part in attention: they belong to the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.attention.base import AttentionBackend
from multimodal_gen.attention.segments import Segments
from multimodal_gen.errors import CorruptModel
from multimodal_gen.kernels.gated_residual import gated_residual_, gated_residual_norm_
from multimodal_gen.kernels.norm_modulate import Norm, layer_norm_scale_shift, rms_norm_scale
from multimodal_gen.kernels.timestep_embedding import timestep_embedding
from multimodal_gen.nn.graphs import Compute, Graphs
from multimodal_gen.nn.linear import FusedLinear, Linear
from multimodal_gen.nn.lowrank import Overlay, Routing
from multimodal_gen.nn.mlp import SwiGLU
from multimodal_gen.nn.norm import PartedRMSNorm, RMSNorm
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.parallel.sequence import LocalSegments, TokenShards
from multimodal_gen.pipelines.stages.first_block import Begun, run_first
from multimodal_gen.pipelines.zimage.packing import Joint, Layout, pad_count

QK_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6
TIME_FREQUENCIES = 256
TIME_HIDDEN = 1024
REFINER = (-1,)  # the region before the joint layers


@dataclass(frozen=True)
class ZImageConfig:
    """`transformer/config.json`; filled by `from_json`."""

    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    norm_eps: float
    cap_feat_dim: int
    rope_theta: float
    t_scale: float
    axes_dims: tuple[int, ...]
    patch_size: int

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ZImageConfig:
        """Raises: CorruptModel for a layout that this implementation does not cover."""
        try:
            made = cls(
                patch_size=config["all_patch_size"][0],
                axes_dims=tuple(config["axes_dims"]),
                **{f: config[f] for f in cls.__dataclass_fields__ if f not in ("patch_size", "axes_dims")},
            )
        except (KeyError, IndexError) as error:
            raise CorruptModel(f"transformer/config.json lacks {error}.") from None
        if made.dim % made.n_heads or sum(made.axes_dims) != made.dim // made.n_heads:
            raise CorruptModel(
                f"transformer/config.json: axes_dims {made.axes_dims} must add up to dim / n_heads = "
                f"{made.dim} / {made.n_heads}."
            )
        for name, wanted in (("all_f_patch_size", [1]), ("qk_norm", True), ("n_kv_heads", made.n_heads)):
            if config.get(name) != wanted:
                raise CorruptModel(
                    f"transformer/config.json: {name} = {config.get(name)!r} is not supported, {wanted!r} is."
                )
        return made

    @property
    def time_dim(self) -> int:
        """Width of the timestep embedding."""
        return min(self.dim, 256)

    @property
    def patch_dim(self) -> int:
        """Numbers in one image patch."""
        return self.patch_size**2 * self.in_channels


class Attention(nn.Module):
    """Self-attention with RMS-normalised queries and keys and three-axis rotary positions."""

    def __init__(self, config: ZImageConfig, backend: AttentionBackend) -> None:
        super().__init__()
        dim = config.dim
        self.head_dim = dim // config.n_heads
        self.qkv = FusedLinear(dim, {"q": dim, "k": dim, "v": dim})
        self.qk_norm = PartedRMSNorm(("q", "k"), self.head_dim, QK_NORM_EPS)
        self.out = Linear(dim, dim)
        self.backend = backend

    def forward(self, x: Tensor, turns: Tensor, segments: Segments, routing: Routing | None) -> Tensor:
        qkv = self.qkv(x, routing).unflatten(-1, (3, -1, self.head_dim))  # [T, 3, H, d]
        q, k, v = self.qk_norm(qkv, turns).unbind(1)
        return self.out(self.backend(q, k, v, segments).flatten(-2), routing)


class Block(nn.Module):
    """Sandwich-normed transformer block; scale and tanh gate come from the timestep where `modulated`."""

    def __init__(self, config: ZImageConfig, backend: AttentionBackend, modulated: bool = True) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.eps = eps
        self.attention = Attention(config, backend)
        self.feed_forward = SwiGLU(dim, int(dim / 3 * 8))
        self.attention_norm1, self.attention_norm2 = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.modulation = Linear(config.time_dim, 4 * dim, bias=True) if modulated else None

    def fold(self, time: Tensor, routing: Routing | None) -> Tensor:
        """What the timestep does to this block, norm weights included: time [1, time_dim] → [4, D]."""
        assert self.modulation is not None, "only modulated blocks see the timestep"
        scale_attn, gate_attn, scale_mlp, gate_mlp = self.modulation(time, routing)[0].chunk(4)
        rows = 1 + scale_attn, gate_attn.tanh(), 1 + scale_mlp, gate_mlp.tanh()
        return torch.stack(rows) * self.norm_weights

    @property
    def norm_weights(self) -> Tensor:
        """[4, D]: before and after attention, before and after the feed-forward network."""
        norms = self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2
        return torch.stack([norm.weight for norm in norms])

    def forward(
        self,
        x: Tensor,
        turns: Tensor,
        segments: Segments,
        routing: Routing | None,
        folded: Tensor | None = None,
    ) -> Tensor:
        """x [T, D] → [T, D], overwritten; folded [4, S, D] is `fold` of each segment's timestep."""
        eps, index = self.eps, None if folded is None else segments.index(x.device)
        folded = self.norm_weights[:, None] if folded is None else folded
        scale_attn, gate_attn, scale_mlp, gate_mlp = folded  # [S, D] each
        h = self.attention(rms_norm_scale(x, scale_attn, index, eps), turns, segments, routing)
        h = gated_residual_norm_(x, h, gate_attn, index, eps, Norm("rms", scale_mlp, None, index, eps))
        return gated_residual_(x, self.feed_forward(h, routing), gate_mlp, index, eps)


class FinalLayer(nn.Module):
    """Parameter-free layer norm, timestep scale, projection to patches."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.modulation = Linear(config.time_dim, config.dim, bias=True)
        self.linear = Linear(config.dim, config.patch_dim, bias=True)

    def fold(self, time: Tensor, routing: Routing | None) -> Tensor:
        """time [1, time_dim] → scale [D]."""
        return 1 + self.modulation(F.silu(time), routing)[0]

    def forward(self, x: Tensor, scale: Tensor, segments: Segments, routing: Routing | None) -> Tensor:
        """x [T, D], scale [S, D] → [T, patch_dim]."""
        x = layer_norm_scale_shift(x, scale, None, segments.index(x.device), FINAL_NORM_EPS)
        return self.linear(x, routing)


@dataclass(frozen=True)
class Modulation:
    """Everything that depends on the timestep alone; filled by `ZImageTransformer.modulate`."""

    refiner: Tensor  # [n_refiner_layers, 4, D]
    layers: Tensor  # [n_layers, 4, D]
    final: Tensor  # [D]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.refiner.nbytes + self.layers.nbytes + self.final.nbytes


@dataclass(frozen=True, eq=False)
class Work:
    """What the joint layers need besides the tokens, for this rank's share of a packed batch; filled by `work`."""

    layout: Layout
    shards: TokenShards
    segments: LocalSegments  # of joint sequences
    turns: Tensor  # float32 cosines and sines of this rank's tokens
    times: list[Modulation]  # per segment
    routing: Routing | None


class ZImageTransformer(nn.Module):
    """Velocity of a packed batch of noisy images under their captions."""

    def __init__(self, config: ZImageConfig, backend: AttentionBackend, sequence: Group = SOLO) -> None:
        """`sequence`: the ranks among which `backend` shares out a sequence."""
        super().__init__()
        self.config = config
        self.sequence = sequence
        self.graphs: Graphs | None = None  # that hold the layers; filled by `Regions`
        dim = config.dim
        self.image_embedder = Linear(config.patch_dim, dim, bias=True)
        self.caption_norm = RMSNorm(config.cap_feat_dim, config.norm_eps)
        self.caption_embedder = Linear(config.cap_feat_dim, dim, bias=True)
        self.time_in = Linear(TIME_FREQUENCIES, TIME_HIDDEN, bias=True)
        self.time_out = Linear(TIME_HIDDEN, config.time_dim, bias=True)
        self.image_pad = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.caption_pad = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.noise_refiner = nn.ModuleList(Block(config, backend) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(
            Block(config, backend, modulated=False) for _ in range(config.n_refiner_layers)
        )
        self.layers = nn.ModuleList(Block(config, backend) for _ in range(config.n_layers))
        self.final = FinalLayer(config)

    def refine_caption(self, features: Tensor, turns: Tensor, overlay: Overlay | None) -> Tensor:
        """Text features [l, cap_feat_dim] → caption tokens [L, D] with L the next multiple of 32."""
        x = self.caption_embedder(self.caption_norm(features), Routing.of([len(features)], [overlay]))
        x = torch.cat([x, self.caption_pad.expand(pad_count(len(x)), -1)])
        routing = Routing.of([len(x)], [overlay])
        for block in self.context_refiner:
            x = block(x, turns, Segments.of([len(x)]), routing)
        return x

    def modulate(self, t: Tensor, overlay: Overlay | None) -> Modulation:
        """Normalised time float32 [1] (0 noise … 1 clean), alone: the result must not depend on a batch."""
        routing = Routing.of([1], [overlay])
        h = timestep_embedding(t * self.config.t_scale, TIME_FREQUENCIES).to(self.time_in.weight.dtype)
        time = self.time_out(F.silu(self.time_in(h, routing)), routing)
        return Modulation(
            refiner=_fold(self.noise_refiner, time, routing),
            layers=_fold(self.layers, time, routing),
            final=self.final.fold(time, routing),
        )

    def forward(
        self,
        patches: Sequence[Tensor],
        times: Sequence[Modulation],
        captions: Sequence[Tensor],
        layout: Layout,
        overlays: Sequence[Overlay | None],
    ) -> list[Tensor]:
        """One velocity per joint sequence of the layout.

        Args:
            patches: per row [l, patch_dim].
            times: per row, `modulate` of its timestep.
            captions: per joint sequence, refined tokens [L, D], in layout order.
            layout: who attends to whom; see `packing.Layout`.
            overlays: per row, its unmerged adapters.

        Returns: per joint sequence, in layout order, [l, patch_dim].
        """
        work = self.work(times, layout, overlays)
        x = work.shards.split(self.embed(patches, times, captions, layout, overlays))
        x = self.through(x, work, 0, len(self.layers))
        return self.predict(x, work)

    def begin(
        self,
        patches: Sequence[Tensor],
        times: Sequence[Modulation],
        captions: Sequence[Tensor],
        layout: Layout,
        overlays: Sequence[Overlay | None],
    ) -> list[Begun]:
        """`forward` as far as the first joint layer, per joint sequence."""
        work = self.work(times, layout, overlays)
        x = work.shards.split(self.embed(patches, times, captions, layout, overlays))
        of_images = [joint.image_tokens for joint in layout.joints]
        return run_first(
            x, work.shards, layout.joint_segments.lengths, of_images, lambda x: self.through(x, work, 0, 1)
        )

    def finish(
        self,
        begun: Sequence[Begun],
        times: Sequence[Modulation],
        layout: Layout,
        overlays: Sequence[Overlay | None],
    ) -> list[Tensor]:
        """The rest of `forward`, for the joint sequences that are left."""
        work = self.work(times, layout, overlays)
        x = work.shards.split(torch.cat([each.x for each in begun]))
        return self.predict(self.through(x, work, 1, len(self.layers)), work)

    def embed(
        self,
        patches: Sequence[Tensor],
        times: Sequence[Modulation],
        captions: Sequence[Tensor],
        layout: Layout,
        overlays: Sequence[Overlay | None],
    ) -> Tensor:
        """What the joint layers begin with: [T, D] of all ranks."""
        of_images = [overlays[row] for row in layout.image_rows]
        x = self._embed_images(patches, layout, Routing.of(layout.image_lengths, of_images))
        x = self._refine(x, times, layout, of_images)
        return self._join(x, captions, layout)

    def _refine(
        self, x: Tensor, times: Sequence[Modulation], layout: Layout, overlays: Sequence[Overlay | None]
    ) -> Tensor:
        """Image tokens among themselves: [T, D] → [T, D]."""
        shards = TokenShards(layout.image_segments.total, self.sequence)
        segments = shards.local(layout.image_segments)
        refiner = torch.stack([times[row].refiner for row in segments.pick(layout.image_rows)], dim=2)  # [n, 4, S, D]
        routing = Routing.of(segments.lengths, segments.pick(overlays))
        x, turns = shards.split(x), shards.split(layout.image_turns)

        def compute(x: Tensor, refiner: Tensor) -> Tensor:
            for block, folded in zip(self.noise_refiner, refiner, strict=True):
                x = block(x, turns, segments, routing, folded)
            return x

        return shards.gather(self._region(compute, (x, refiner), REFINER, layout, (turns, segments), routing))

    def work(self, times: Sequence[Modulation], layout: Layout, overlays: Sequence[Overlay | None]) -> Work:
        """This rank's share of what the joint layers need besides tokens."""
        shards = TokenShards(layout.joint_segments.total, self.sequence)
        segments = shards.local(layout.joint_segments)
        rows = [joint.row for joint in segments.pick(layout.joints)]
        routing = Routing.of(segments.lengths, [overlays[row] for row in rows])
        turns = shards.split(layout.joint_turns)
        return Work(layout, shards, segments, turns, [times[row] for row in rows], routing)

    def through(self, x: Tensor, work: Work, begin: int, end: int) -> Tensor:
        """Image and caption tokens of this rank [T, D] through some of the joint layers, overwritten."""
        folded = torch.stack([time.layers[begin:end] for time in work.times], dim=2)  # [n, 4, S, D]
        turns, segments, routing = (
            work.turns,
            work.segments,
            work.routing,
        )

        def compute(x: Tensor, folded: Tensor) -> Tensor:
            for index in range(begin, end):
                x = self.layers[index](x, turns, segments, routing, folded[index - begin])
            return x

        return self._region(compute, (x, folded), (begin, end), work.layout, (turns, segments), routing)

    def _region(
        self,
        compute: Compute,
        inputs: Sequence[Tensor],
        place: tuple[int, ...],
        layout: Layout,
        held: tuple[object, ...],
        routing: Routing | None,
    ) -> Tensor:
        """compute(*inputs), in a graph where there are any; adapters beside the weights change from call to call."""
        if self.graphs is None or routing is not None:
            return compute(*inputs)
        return self.graphs.run(compute, inputs, place, (layout,), held)

    def predict(self, x: Tensor, work: Work) -> list[Tensor]:
        """x [T, D] after the last layer → per joint sequence, of all ranks, [l, patch_dim]."""
        final = torch.stack([time.final for time in work.times])  # [S, D]
        x = work.shards.gather(self.final(x, final, work.segments, work.routing))
        return self._image_tokens(x, work.layout.joints)

    def _embed_images(self, patches: Sequence[Tensor], layout: Layout, routing: Routing | None) -> Tensor:
        x = self.image_embedder(torch.cat([patches[row] for row in layout.image_rows]), routing)
        pieces = []
        for tokens in x.split(layout.image_lengths):
            pieces += [tokens, self.image_pad.expand(pad_count(len(tokens)), -1)]
        return torch.cat(pieces)

    def _join(self, x: Tensor, captions: Sequence[Tensor], layout: Layout) -> Tensor:
        images = x.split(layout.image_segments.lengths)
        return torch.cat([part for j, c in zip(layout.joints, captions, strict=True) for part in (images[j.image], c)])

    def _image_tokens(self, x: Tensor, joints: Sequence[Joint]) -> list[Tensor]:
        parts = x.split([joint.length for joint in joints])
        return [part[: joint.image_tokens] for part, joint in zip(parts, joints, strict=True)]


def _fold(blocks: nn.ModuleList, time: Tensor, routing: Routing | None) -> Tensor:
    """[blocks, 4, D]."""
    return torch.stack([block.fold(time, routing) for block in blocks if isinstance(block, Block)])
