"""One layer of a decoder: attention over pages and a feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from multimodal_gen.attention.paged import Attend
from multimodal_gen.kernels.gated_residual import gated_residual_norm_
from multimodal_gen.kernels.qk_norm_rope import qk_norm_rope_
from multimodal_gen.llm.batch import Batch
from multimodal_gen.llm.kv_cache import KVCache
from multimodal_gen.llm.models.config import DecoderConfig
from multimodal_gen.llm.models.rope import Rotation
from multimodal_gen.nn.linear import FusedLinear, Linear
from multimodal_gen.nn.mlp import SwiGLU
from multimodal_gen.nn.norm import ThinRMSNorm, rms_normalize_thin
from multimodal_gen.nn.slots import Cut, How, hollow
from multimodal_gen.parallel.group import Group


class QKV(FusedLinear):
    """Queries, keys and values of all heads; ranks share heads, and those that share keys have the same ones."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.width, _parts(config, config.heads, config.kv_heads), bias=config.qkv_bias)
        self.config = config
        self.heads, self.kv_heads = config.heads, config.kv_heads  # held here
        self.kv_cut: Cut | None = None  # filled by shard_

    def cut(self, parameter: str, part: str | None) -> Cut | None:
        """Keys and values may be held by several ranks."""
        return super().cut(parameter, part) if part == "q" else self.kv_cut

    def shard_(self, how: How, group: Group, name: str) -> None:
        """Raises: ConfigError naming both numbers."""
        assert how == "column", f"{name}: heads are shared out by column, not by {how}"
        self.heads, self.kv_heads = self.config.share(group.size)
        self.sizes = tuple(_parts(self.config, self.heads, self.kv_heads).values())
        self.stored = list(self.sizes)
        self.cuts = {parameter: Cut(0, group.rank, group.size) for parameter in ("weight", "bias")}
        pieces = self.config.kv_heads // self.kv_heads
        self.kv_cut = Cut(0, group.rank * pieces // group.size, pieces)
        self.weight = hollow((sum(self.sizes), self.weight.shape[1]), self.weight)
        self.bias = None if self.bias is None else hollow((sum(self.sizes),), self.bias)


def _parts(config: DecoderConfig, heads: int, kv_heads: int) -> dict[str, int]:
    return {"q": heads * config.head_dim, "k": kv_heads * config.head_dim, "v": kv_heads * config.head_dim}


@dataclass(frozen=True)
class At:
    """What all layers of one forward share."""

    batch: Batch
    rotation: Rotation
    attend: Attend


class HeadNorm(nn.Module):
    """RMS norms of queries and of keys, per head."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.q, self.k = ThinRMSNorm(head_dim, eps), ThinRMSNorm(head_dim, eps)

    def forward(self, qk: Tensor, heads: int) -> Tensor:
        """qk [T, H + Hkv, D]: the first `heads` are queries."""
        normal = rms_normalize_thin(qk, self.q.eps)
        normal[:, :heads].mul_(self.q.weight)
        normal[:, heads:].mul_(self.k.weight)
        return normal

    def turn_(self, qk: Tensor, heads: int, turns: Tensor) -> None:
        """The same in place, and turned by float32 [T, 2, D / 2]: one pass over the queries, one over the keys."""
        for part, norm in ((qk[:, :heads], self.q), (qk[:, heads:], self.k)):
            qk_norm_rope_(part[:, None], norm.weight[None], turns, norm.eps, pairs="halves")


class Attention(nn.Module):
    """Causal attention over the pages of each sequence."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.qkv = QKV(config)
        self.norm = HeadNorm(config.head_dim, config.eps) if config.qk_norm else None
        self.out = Linear(config.heads * config.head_dim, config.width, config.out_bias)

    def forward(self, x: Tensor, at: At, cache: KVCache, layer: int) -> Tensor:
        heads, kv_heads = self.qkv.heads, self.qkv.kv_heads
        states = self.qkv(x, at.batch.routing).unflatten(1, (heads + 2 * kv_heads, -1))  # [T, H + 2 · Hkv, D]
        qk = states[:, : heads + kv_heads]
        if self.norm is not None and at.rotation.turns is not None:
            self.norm.turn_(qk, heads, at.rotation.turns)
        else:
            if self.norm is not None:
                qk.copy_(self.norm(qk, heads))
            at.rotation.turn_(qk)
        kv = states[:, heads:].unflatten(1, (2, kv_heads))
        cache.write(layer, kv, at.batch.slots_at)
        mixed = at.attend(layer, states[:, :heads], kv)
        return self.out(mixed.flatten(1), at.batch.routing)


class Layer(nn.Module):
    """Attention and a feed-forward network, each added to what it reads."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = ThinRMSNorm(config.width, config.eps)
        self.attention = Attention(config)
        self.mlp_norm = ThinRMSNorm(config.width, config.eps)
        self.mlp = SwiGLU(config.width, config.hidden)

    def forward(self, x: Tensor, at: At, cache: KVCache, layer: int) -> Tensor:
        mixed = self.attention(self.attention_norm(x), at, cache, layer)
        if x.is_cuda:
            normal = gated_residual_norm_(x, mixed, None, None, None, self.mlp_norm.as_norm())
            return x.add_(self.mlp(normal, at.batch.routing))
        x = x + mixed
        return x.add_(self.mlp(self.mlp_norm(x), at.batch.routing))
