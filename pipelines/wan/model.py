"""The Wan diffusion transformer (Wan Team, 2025; reference: diffusers WanTransformer3DModel).

Shapes: T packed tokens of all sequences, S pieces of tokens with one timestep, D model width, H heads, d head width,
L text tokens.

On ranks that share sequences, T is this rank's slice of the packed batch and H its share of the heads.

What does not depend on the latents is made apart, once: `modulate` for a timestep, `read` for a prompt (and a picture).
Time embedder, modulation and layer norms stay in float32 whatever the dtype of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.attention.base import AttentionBackend
from multimodal_gen.attention.cross import Keys, cross_attend
from multimodal_gen.kernels.eager import eager_break
from multimodal_gen.kernels.gated_product import gelu_tanh_
from multimodal_gen.kernels.gated_residual import gated_residual_, gated_residual_norm_
from multimodal_gen.kernels.norm_modulate import Norm, layer_norm_scale_shift
from multimodal_gen.kernels.timestep_embedding import timestep_embedding
from multimodal_gen.nn.graphs import Graphs
from multimodal_gen.nn.linear import FusedLinear, Linear, PatchEmbedding
from multimodal_gen.nn.lowrank import Overlay, Routing
from multimodal_gen.nn.mlp import GeluMLP
from multimodal_gen.nn.norm import AcrossHeadsRMSNorm, LayerNorm
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.parallel.sequence import TokenShards
from multimodal_gen.pipelines.stages.first_block import Begun, run_first
from multimodal_gen.pipelines.wan.config import WanConfig
from multimodal_gen.pipelines.wan.packing import Layout, Slice

IMAGE_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Seen:
    """What one layer's cross-attention looks at, for one prompt."""

    text: Keys
    image: Keys | None  # of models with an image encoder


@dataclass(frozen=True, eq=False)
class Context:
    """One prompt, as all layers see it; made by `WanTransformer.read`.

    What a layer makes of it is made when the layer first computes with it, because only then are its weights sure to be
    there; and kept for the steps that follow.
    """

    text: Tensor  # [L, D]
    pads: int  # how often its last token counts
    image: Tensor | None  # [I, D], of models with an image encoder
    overlay: Overlay | None
    keep: bool
    layers: dict[int, Seen] = field(default_factory=dict)  # filled by `at`, where they are kept

    def at(self, layer: int, attention: CrossAttention) -> Seen:
        """What the cross-attention of a layer looks at."""
        if layer in self.layers:
            return self.layers[layer]
        seen = attention.read(self.text, self.pads, self.image, self.overlay)
        if self.keep:
            self.layers[layer] = seen
        return seen


@dataclass(frozen=True)
class Modulation:
    """Everything that depends on the timestep alone, float32; filled by `WanTransformer.modulate`."""

    layers: Tensor  # [layers, 6, D]: shift, 1 + scale, gate of self-attention, the same of the feed-forward
    final: Tensor  # [2, D]: shift, 1 + scale

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.layers.nbytes + self.final.nbytes


@dataclass(frozen=True, eq=False)
class Work:
    """What the blocks need besides the tokens, for this rank's share of a packed batch; filled by `work`."""

    layout: Layout
    shards: TokenShards
    slice: Slice
    times: list[Modulation]  # per piece of the slice
    contexts: list[Context]  # per sequence of the slice
    routing: Routing | None


class SelfAttention(nn.Module):
    """Attention inside each video, queries and keys normalised across all heads and turned by their position."""

    def __init__(self, config: WanConfig, backend: AttentionBackend) -> None:
        super().__init__()
        dim = config.dim
        self.head_dim = config.attention_head_dim
        self.qkv = FusedLinear(dim, {"q": dim, "k": dim, "v": dim}, bias=True)
        self.qk_norm = AcrossHeadsRMSNorm(("q", "k"), dim, config.eps)
        self.out = Linear(dim, dim, bias=True)
        self.backend = backend

    def forward(self, x: Tensor, slice_: Slice, routing: Routing | None) -> Tensor:
        qkv = self.qkv(x, routing).unflatten(-1, (3, -1, self.head_dim))  # [T, 3, H, d]
        q, k, v = self.qk_norm(qkv, slice_.turns).unbind(1)
        return self.out(self.backend(q, k, v, slice_.segments).flatten(-2), routing)


class CrossAttention(nn.Module):
    """Attention to a prompt, and to the tokens of a picture where the model has an image encoder."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.head_dim = config.attention_head_dim
        self.q = Linear(dim, dim, bias=True)
        self.kv = FusedLinear(dim, {"k": dim, "v": dim}, bias=True)
        self.q_norm = AcrossHeadsRMSNorm(("q",), dim, config.eps)
        self.k_norm = AcrossHeadsRMSNorm(("k",), dim, config.eps)
        self.out = Linear(dim, dim, bias=True)
        if config.image_dim is not None:
            self.image_kv = FusedLinear(dim, {"k": dim, "v": dim}, bias=True)
            self.image_k_norm = AcrossHeadsRMSNorm(("k",), dim, config.eps)

    def read(self, text: Tensor, pads: int, image: Tensor | None, overlay: Overlay | None) -> Seen:
        """Keys and values of text [L, D], whose last token counts `pads` times, and of image [I, D]."""
        seen = self._keys(self.kv, self.k_norm, text, max(pads, 1), overlay)
        if image is None:
            return Seen(seen, None)
        return Seen(seen, self._keys(self.image_kv, self.image_k_norm, image, 1, overlay))

    def _keys(self, kv: FusedLinear, norm: AcrossHeadsRMSNorm, x: Tensor, last: int, overlay: Overlay | None) -> Keys:
        both = kv(x, Routing.of([len(x)], [overlay])).unflatten(-1, (2, -1, self.head_dim))  # [L, 2, H, d]
        k, v = norm(both).unbind(1)
        return Keys(k, v, last)

    def forward(self, x: Tensor, seen: Sequence[Seen], lengths: Sequence[int], routing: Routing | None) -> Tensor:
        q = self.q_norm(self.q(x, routing).unflatten(-1, (1, -1, self.head_dim)))[:, 0]  # [T, H, d]
        y = cross_attend(q, lengths, [s.text for s in seen])
        images = [s.image for s in seen if s.image is not None]
        if images:
            y = y + cross_attend(q, lengths, images)
        return self.out(y.flatten(-2), routing)


class Block(nn.Module):
    """Self-attention and feed-forward under the timestep, cross-attention between them without it."""

    def __init__(self, config: WanConfig, backend: AttentionBackend, index: int) -> None:
        super().__init__()
        dim, self.eps, self.index = config.dim, config.eps, index
        self.attn1 = SelfAttention(config, backend)
        self.norm2 = LayerNorm(dim, config.eps)
        self.attn2 = CrossAttention(config)
        self.ffn = GeluMLP(dim, config.ffn_dim, dim, "tanh")
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, dim, dtype=torch.float32), requires_grad=False)

    def forward(
        self, x: Tensor, folded: Tensor, contexts: Sequence[Context], slice_: Slice, routing: Routing | None
    ) -> Tensor:
        """x [T, D] → [T, D], overwritten; folded float32 [6, S, D]; contexts per sequence of the slice."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = folded  # [S, D] each
        index, eps = slice_.times.index(x.device), self.eps
        h = self.attn1(layer_norm_scale_shift(x, scale, shift, index, eps), slice_, routing)
        h = gated_residual_norm_(x, h, gate, index, None, self.norm2.as_norm())
        h = self.attn2(h, self.look(contexts), slice_.segments.lengths, routing)
        h = gated_residual_norm_(x, h, None, None, None, Norm("layer", ffn_scale, ffn_shift, index, eps))
        return gated_residual_(x, self.ffn(h, routing), ffn_gate, index)

    @eager_break(recorded=True)
    def look(self, contexts: Sequence[Context]) -> list[Seen]:
        """What this layer makes of prompts, made once where it is kept."""
        return [context.at(self.index, self.attn2) for context in contexts]


class ImageEmbedder(nn.Module):
    """Tokens of the image encoder → model width."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(image_dim, IMAGE_NORM_EPS)
        self.up = Linear(image_dim, image_dim, bias=True)
        self.down = Linear(image_dim, dim, bias=True)
        self.norm2 = LayerNorm(dim, IMAGE_NORM_EPS)

    def forward(self, x: Tensor, routing: Routing | None) -> Tensor:
        return self.norm2(self.down(F.gelu(self.up(self.norm1(x), routing)), routing))


class WanTransformer(nn.Module):
    """Velocity of a packed batch of noisy videos under their prompts."""

    def __init__(self, config: WanConfig, backend: AttentionBackend, sequence: Group = SOLO) -> None:
        """`sequence`: the ranks that share every packed batch; `backend` attends across them."""
        super().__init__()
        self.config = config
        self.sequence = sequence
        self.graphs: Graphs | None = None  # that hold the blocks; filled by `Regions`
        dim, single = config.dim, torch.float32
        self.patch_embedding = PatchEmbedding(config.in_channels, config.patch_size, dim)
        self.time_in = Linear(config.freq_dim, dim, bias=True, dtype=single)
        self.time_out = Linear(dim, dim, bias=True, dtype=single)
        self.time_proj = Linear(dim, 6 * dim, bias=True)
        self.text_in = Linear(config.text_dim, dim, bias=True)
        self.text_out = Linear(dim, dim, bias=True)
        self.image_embedder = None if config.image_dim is None else ImageEmbedder(config.image_dim, dim)
        self.blocks = nn.ModuleList(Block(config, backend, index) for index in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, dim, dtype=single), requires_grad=False)
        self.proj_out = Linear(dim, self.out_dim, bias=True)

    @property
    def out_dim(self) -> int:
        """Numbers that are predicted for one patch."""
        return self.config.out_channels * self.config.patch_elements

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but the float32 islands."""
        return self.proj_out.weight.dtype

    def modulate(self, t: Tensor, overlay: Overlay | None) -> Modulation:
        """Timestep float32 [1] (1000 noise … 0 clean), alone: the result must not depend on a batch."""
        routing = Routing.of([1], [overlay])
        h = F.silu(self.time_in(timestep_embedding(t, self.config.freq_dim), routing))
        time = self.time_out(h, routing).to(self.dtype)  # [1, D]
        steps = self.time_proj(F.silu(time), routing).view(6, -1).float()
        layers = torch.stack([block.scale_shift_table[0] + steps for block in self.blocks if isinstance(block, Block)])
        layers[:, 1::3] += 1
        final = self.scale_shift_table[0] + time.float()
        final[1] += 1
        return Modulation(layers, final)

    def read(self, text: Tensor, pads: int, image: Tensor | None, overlay: Overlay | None, *, keep: bool) -> Context:
        """Text features [l, text_dim] followed by `pads` zero vectors, and image features [I, image_dim].

        `keep`: layers make of it what they look at once, not at every step.
        """
        if pads:
            text = torch.cat([text, text.new_zeros(1, text.shape[1])])
        routing = Routing.of([len(text)], [overlay])
        text = self.text_out(gelu_tanh_(self.text_in(text, routing)), routing)
        if image is not None and self.image_embedder is not None:
            image = self.image_embedder(image, Routing.of([len(image)], [overlay]))
        return Context(text, pads, image, overlay, keep)

    def forward(
        self,
        patches: Sequence[Tensor],
        times: Sequence[Modulation],
        contexts: Sequence[Context],
        layout: Layout,
        overlays: Sequence[Overlay | None],
    ) -> list[Tensor]:
        """One velocity per sequence of the layout.

        Args:
            patches: per sequence [l, C · patch].
            times: per piece of the layout, `modulate` of its timestep.
            contexts: per sequence, `read` of its prompt.
            layout: who attends to whom; see `packing.Layout`.
            overlays: per sequence, its unmerged adapters.

        Returns: per sequence [l, patch · C].
        """
        work = self.work(times, contexts, layout, overlays)
        x = self.embed(patches, work)
        x = self.through(x, work, 0, len(self.blocks))
        return self.predict(x, work)

    def begin(
        self,
        patches: Sequence[Tensor],
        times: Sequence[Modulation],
        contexts: Sequence[Context],
        layout: Layout,
        overlays: Sequence[Overlay | None],
    ) -> list[Begun]:
        """`forward` as far as the first block, per sequence."""
        work = self.work(times, contexts, layout, overlays)
        lengths = layout.segments.lengths
        x = self.embed(patches, work)
        return run_first(x, work.shards, lengths, lengths, lambda x: self.through(x, work, 0, 1))

    def finish(
        self,
        begun: Sequence[Begun],
        times: Sequence[Modulation],
        contexts: Sequence[Context],
        layout: Layout,
        overlays: Sequence[Overlay | None],
    ) -> list[Tensor]:
        """The rest of `forward`, for the sequences that are left."""
        work = self.work(times, contexts, layout, overlays)
        x = work.shards.split(torch.cat([each.x for each in begun]))
        return self.predict(self.through(x, work, 1, len(self.blocks)), work)

    def work(
        self,
        times: Sequence[Modulation],
        contexts: Sequence[Context],
        layout: Layout,
        overlays: Sequence[Overlay | None],
    ) -> Work:
        """This rank's share of what `forward` is given besides patches."""
        shards = TokenShards(layout.segments.total, self.sequence)
        slice_ = Slice.of(layout, shards)
        routing = Routing.of(slice_.segments.lengths, slice_.segments.pick(overlays))
        return Work(layout, shards, slice_, slice_.times.pick(times), slice_.segments.pick(contexts), routing)

    def embed(self, patches: Sequence[Tensor], work: Work) -> Tensor:
        """→ this rank's tokens [T, D]."""
        return self.patch_embedding(work.shards.split(torch.cat(list(patches))), work.routing)

    def through(self, x: Tensor, work: Work, begin: int, end: int) -> Tensor:
        """x [T, D] through some of the blocks, overwritten."""
        folded = torch.stack([time.layers[begin:end] for time in work.times], dim=2)  # [blocks, 6, S, D]

        def compute(x: Tensor, folded: Tensor) -> Tensor:
            for index in range(begin, end):
                x = self.blocks[index](x, folded[index - begin], work.contexts, work.slice, work.routing)
            return x

        if self.graphs is None or work.routing is not None:
            return compute(x, folded)
        return self.graphs.run(compute, (x, folded), (begin, end), (work.layout, *work.contexts))

    def predict(self, x: Tensor, work: Work) -> list[Tensor]:
        """x [T, D] after the last block → per sequence [l, patch · C], of all ranks."""
        shift, scale = torch.stack([time.final for time in work.times], dim=1)  # [S, D] each
        x = layer_norm_scale_shift(x, scale, shift, work.slice.times.index(x.device), self.config.eps)
        return list(work.shards.gather(self.proj_out(x, work.routing)).split(work.layout.segments.lengths))
