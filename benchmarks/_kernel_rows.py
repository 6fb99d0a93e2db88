"""The table of `kernels.py`: what each operation is measured on. Add a row with a kernel.

Shapes are those of a step of the 478 M Z-Image at 512 x 512 (1024 image tokens and 32 of text, width 1536), of a Wan
slice, of the decoders, and of SmolLM2's decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels import native
from multimodal_gen.kernels.blocked_linear import BlockedWeight, blocked_linear, blocked_swiglu
from multimodal_gen.kernels.conv3x3 import conv3x3, make_filters
from multimodal_gen.kernels.gated_norm import gated_norm
from multimodal_gen.kernels.gated_product import gated_product, gelu_tanh_
from multimodal_gen.kernels.gated_residual import gated_residual_, gated_residual_norm_
from multimodal_gen.kernels.group_norm_silu import group_norm_silu
from multimodal_gen.kernels.grouped_lora import grouped_lora_
from multimodal_gen.kernels.int8_product import Int8Weight
from multimodal_gen.kernels.norm_modulate import Norm, layer_norm_scale_shift, rms_norm_scale
from multimodal_gen.kernels.packed_attention import packed_attention
from multimodal_gen.kernels.packed_linear import PackedWeight
from multimodal_gen.kernels.paged_attention import Spans, paged_attention
from multimodal_gen.kernels.qk_norm_rope import qk_norm_rope_
from multimodal_gen.kernels.ring_merge import ring_merge_
from multimodal_gen.kernels.rms_norm_silu import rms_norm_silu
from multimodal_gen.kernels.sampling import Wishes, sample

T, WIDTH, HEADS, HEAD, HIDDEN = 1056, 1536, 12, 128, 4096
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One operation on one shape. `moved` bytes are the floor (every operand once); `flops` of products."""

    op: str
    shape: str
    ours: Call
    reference: Call
    """the same by torch: what `--kernels torch` computes, or torch's own operation"""
    moved: int
    flops: int = 0
    """above 0: the op is held against the rate of products, else against the copy bandwidth"""


def rows(dtype: torch.dtype) -> Iterator[Row]:
    """The table, one row at a time: operands of one need not live beside those of the next."""
    torch.manual_seed(0)

    def new(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float32).to(like)

    def native_row(op: str, shape: str, call: Call, moved: int, flops: int = 0) -> Row:
        return Row(op, shape, call, lambda: _by_torch(call), moved, flops)

    x, y, scale, shift = new(T, WIDTH), new(T, WIDTH), new(2, WIDTH), new(2, WIDTH)
    index = torch.arange(T, dtype=torch.int32) // (T // 2)
    size, tokens = x.nbytes, f"[{T}, {WIDTH}]"
    norm = Norm("rms", scale, None, index, 1e-5)
    yield native_row("rms_norm_scale", tokens, lambda: rms_norm_scale(x, scale, index, 1e-5), 2 * size)
    yield native_row(
        "layer_norm_scale_shift", tokens, lambda: layer_norm_scale_shift(x, scale, shift, index, 1e-6), 2 * size
    )
    yield native_row("gated_residual_", tokens, lambda: gated_residual_(x, y, scale, index, 1e-5), 3 * size)
    yield native_row(
        "gated_residual_norm_", tokens, lambda: gated_residual_norm_(x, y, scale, index, 1e-5, norm), 4 * size
    )
    yield native_row("gated_norm", tokens, lambda: gated_norm(x, y, scale[0], None, 1e-5), 3 * size)

    qkv, weight, turns = new(T, 3, HEADS, HEAD), new(2, HEAD), new(T, 2, HEAD // 2, like=torch.float32)
    shape = f"[{T}, 3, {HEADS}, {HEAD}]"
    yield native_row("qk_norm_rope_", shape, lambda: qk_norm_rope_(qkv, weight, turns, 1e-5), 4 * qkv.nbytes // 3)
    across = new(2, HEADS * HEAD)
    yield native_row(
        "qk_norm_rope_ across heads", shape, lambda: qk_norm_rope_(qkv, across, turns, 1e-5), 4 * qkv.nbytes // 3
    )

    both, up = new(T, 2 * HIDDEN), new(T, 8960)
    gate, other = both.chunk(2, -1)
    yield native_row("gated_product", f"[{T}, {HIDDEN}]", lambda: gated_product(gate, other), 3 * both.nbytes // 2)
    yield native_row("gelu_tanh_", f"[{T}, 8960]", lambda: gelu_tanh_(up), 2 * up.nbytes)

    out, lse, more = new(T, HEADS, HEAD, like=torch.float32), new(T, HEADS, like=torch.float32), new(T, HEADS, HEAD)
    yield native_row(
        "ring_merge_", f"[{T}, {HEADS}, {HEAD}]", lambda: ring_merge_(out, lse, more, lse), 2 * out.nbytes + more.nbytes
    )

    yield from _attention(new, dtype)
    yield from _products(new, native_row, dtype)
    yield from _decoding(new, native_row)
    yield from _pictures(new, native_row)


def _attention(new: Callable[..., Tensor], dtype: torch.dtype) -> Iterator[Row]:
    """A picture of the 478 M model and one of 128 x 128, a prompt that Wan looks at, a VAE's one head."""
    for queries, keys, heads, width in (
        (T, T, HEADS, HEAD),
        (96, 96, HEADS, HEAD),
        (1560, 512, 12, 128),
        (1024, 1024, 1, 512),
    ):
        q, k, v = new(queries, heads, width), new(keys, heads, width), new(keys, heads, width)
        one = [part.transpose(0, 1)[None] for part in (q, k, v)]
        yield Row(
            "packed_attention",
            f"[{queries}, {heads}, {width}] to {keys} keys",
            lambda q=q, k=k, v=v: packed_attention(q, k, v, (len(q),), (len(k),)),
            lambda one=one: F.scaled_dot_product_attention(*one),
            2 * (queries + keys) * heads * width * dtype.itemsize,
            4 * queries * keys * heads * width,
        )


def _products(new: Callable[..., Tensor], native_row: Callable[..., Row], dtype: torch.dtype) -> Iterator[Row]:
    for rows_, inputs, outputs in ((T, WIDTH, 3 * WIDTH), (T, WIDTH, 2 * HIDDEN), (T, HIDDEN, WIDTH)):
        x, w = new(rows_, inputs), new(outputs, inputs)
        packed, int8 = PackedWeight(w), Int8Weight(w)
        shape, flops = f"[{rows_}, {inputs}] · [{inputs}, {outputs}]", 2 * rows_ * inputs * outputs
        plain = lambda x=x, w=w: F.linear(x, w)  # noqa: E731
        moved = x.nbytes + w.nbytes + rows_ * outputs * dtype.itemsize
        yield Row("packed_linear", shape, lambda x=x, p=packed: p(x, None), plain, moved, flops)
        yield Row("int8_product", shape, lambda x=x, p=int8: p(x, None), plain, moved, flops)
        for name, kept in (("blocked_linear", None), ("blocked_linear int8", torch.int8)):
            blocked = BlockedWeight(w, kept)
            yield Row(name, shape, lambda x=x, b=blocked: blocked_linear(x, b), plain, moved, flops)
    for rows_, inputs, hidden in ((T, WIDTH, HIDDEN), (192, 320, 864)):
        x, w = new(rows_, inputs), new(2 * hidden, inputs)
        blocked = BlockedWeight(w, halves=True)
        yield Row(
            "blocked_swiglu",
            f"[{rows_}, {inputs}] · [{inputs}, 2 · {hidden}]",
            lambda x=x, b=blocked: blocked_swiglu(x, b),
            lambda x=x, w=w: _swiglu(F.linear(x, w)),
            x.nbytes + w.nbytes + rows_ * hidden * dtype.itemsize,
            4 * rows_ * inputs * hidden,
        )
    x, y, down, up = new(32, WIDTH), new(32, 3 * WIDTH), new(WIDTH, 128), new(128, 3 * WIDTH)
    starts, owners = torch.arange(0, 129, 16, dtype=torch.int32), torch.arange(32, dtype=torch.int32) % 8
    yield native_row(
        "grouped_lora_",
        f"32 tokens, 8 adapters of rank 16, {WIDTH} to {3 * WIDTH}",
        lambda y=y, x=x: grouped_lora_(y, x, down, up, starts, owners),
        x.nbytes + 2 * y.nbytes + down.nbytes + up.nbytes,
    )
    for rows_ in (1, 8, 32):
        x, w = new(rows_, 576), new(49152, 576)  # the output layer of SmolLM2
        blocked, shape = BlockedWeight(w), f"[{rows_}, 576] · [576, 49152]"
        plain = lambda x=x, w=w: F.linear(x, w)  # noqa: E731
        moved = x.nbytes + w.nbytes + rows_ * 49152 * dtype.itemsize
        yield Row("blocked_linear", shape, lambda x=x, b=blocked: blocked_linear(x, b), plain, moved)


def _swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def _decoding(new: Callable[..., Tensor], native_row: Callable[..., Row]) -> Iterator[Row]:
    texts, tokens, pages = 32, 192, 12  # of SmolLM2: 9 heads over 3 of keys, 64 wide
    cache, q = new(2, texts * pages, 3, 16, 64), new(texts, 9, 64)
    table = [[at, tokens - 1, 1, at * pages] for at in range(texts)]
    spans = Spans(torch.tensor(table, dtype=torch.int32), torch.arange(texts * pages, dtype=torch.int32))
    shape = f"{texts} of {tokens} tokens"
    yield native_row("paged_attention", shape, lambda: paged_attention(q, cache, spans), cache.nbytes + 2 * q.nbytes)

    logits = new(texts, 49152, like=torch.float32) * 3
    wishes = Wishes(
        temperature=torch.full((texts,), 0.8),
        top_k=torch.full((texts,), 50, dtype=torch.int32),
        top_p=torch.full((texts,), 0.9, dtype=torch.float64),
        min_p=torch.zeros(texts),
        uniform=torch.rand(texts, dtype=torch.float64),
    )
    yield native_row("sampling", f"[{texts}, 49152] top-k, top-p", lambda: sample(logits, wishes), logits.nbytes)


def _pictures(new: Callable[..., Tensor], native_row: Callable[..., Row]) -> Iterator[Row]:
    for side, channels in ((256, 128), (64, 256)):
        x, weight, bias = new(side, side, channels), new(channels), new(channels)
        yield native_row(
            "group_norm_silu",
            f"[{side}, {side}, {channels}]",
            lambda x=x, w=weight, b=bias: group_norm_silu(x, w, b, 32, 1e-6),
            2 * x.nbytes,
        )
    wide = torch.float32  # what Wan's decoder computes in
    x, weight = new(4, 160, 104, 192, like=wide), new(192, like=wide)
    yield native_row("rms_norm_silu", "[4, 160, 104, 192] float32", lambda: rms_norm_silu(x, weight), 2 * x.nbytes)
    for taps, frames, side, channels in ((1, 1, 256, 128), (3, 4, 64, 192)):
        like = wide if taps == 3 else None
        kept = {} if like is None else {"like": like}
        x, w, b = (
            new(frames + taps - 1, side, side, channels, **kept),
            new(channels, channels, taps, 3, 3, **kept),
            new(channels, **kept),
        )
        filters = make_filters(w)
        flops = 2 * frames * side * side * channels * channels * taps * 9
        yield native_row(
            "conv3x3",
            f"{frames} x [{side}, {side}, {channels}], {taps} frames" + (" float32" if like else ""),
            lambda x=x, w=w, b=b, f=filters, h=taps - 1: conv3x3(x, w, b, history=h, filters=f),
            x.nbytes + w.nbytes + frames * side * side * channels * x.itemsize,
            flops,
        )


def _by_torch(call: Call) -> object:
    with native.torch_only() if native.library() else nullcontext():
        return call()
