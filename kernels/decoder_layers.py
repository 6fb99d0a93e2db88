"""All layers of a decoder in one call, on a CPU: norms, products, positions, attention over pages, the SwiGLU network.

One token passes 30 layers of SmolLM2 in 5 ms, and each of some hundred calls per layer would take its share of that.
Threads stay together from the first layer to the last and wait for one another eight times per layer. What stands
between products is fused into them: x += out(…), silu(gate) · up, keys turned on their way into their page. Numbers are
rounded where they are written to memory: after a norm, a product with all that follows it, attention.

The figure is `llm/models/decoder.py`, whose layers give the same up to that rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal_gen.kernels import native
from multimodal_gen.kernels.blocked_linear import BlockedWeight, CWeight, int8_rows
from multimodal_gen.kernels.paged_attention import Spans

_plain = native.Function("decoder_layers", "pp")
_int8 = native.Function("decoder_layers_int8", "pp")
Pointer, Count = ctypes.c_void_p, ctypes.c_int64


class CLayer(ctypes.Structure):
    """`Layer` of cpu/decoder_layers.cpp."""

    _fields_ = (
        ("qkv", CWeight),
        ("out", CWeight),
        ("gate_up", CWeight),
        ("down", CWeight),
        ("attention_norm", Pointer),
        ("q_norm", Pointer),
        ("k_norm", Pointer),
        ("mlp_norm", Pointer),
        ("cache", Pointer),
    )


class CModel(ctypes.Structure):
    """`Model`."""

    _fields_ = (
        ("layers", ctypes.POINTER(CLayer)),
        *((name, Count) for name in ("count", "width", "heads", "kv_heads", "dim", "hidden", "pages", "page_size")),
        ("eps", ctypes.c_double),
    )


class CForward(ctypes.Structure):
    """`Forward`."""

    _fields_ = (
        *((name, Pointer) for name in ("x", "cos", "sin", "slots", "spans", "pages")),
        *((name, Pointer) for name in ("normed", "states", "mixed", "gated", "numbers", "scales", "taken")),
        *((name, Count) for name in ("rows", "span_count")),
    )


@dataclass(frozen=True)
class LayerTensors:
    """One layer. Norms and biases are in the dtype of rows."""

    qkv: BlockedWeight
    out: BlockedWeight
    gate_up: BlockedWeight  # `halves`
    down: BlockedWeight
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    attention_norm: Tensor  # [width]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None
    mlp_norm: Tensor  # [width]
    cache: Tensor  # [2, pages, Hkv, page_size, D]


@dataclass(frozen=True)
class Rows:
    """The tokens of one forward."""

    cos: Tensor  # [T, D] in the dtype of rows
    sin: Tensor  # negative in the first half
    slots: Tensor  # int64 [T]: page · page_size + offset of each token
    spans: Spans


class DecoderLayers:
    """Layers bound to their weights and pages, which it holds."""

    def __init__(self, layers: Sequence[LayerTensors], heads: int, eps: float) -> None:
        _check(layers, heads)
        self._held = tuple(layers)
        first = layers[0]
        _, pages, kv_heads, size, dim = first.cache.shape
        self._heads, self._kv_heads, self._dim = heads, kv_heads, dim
        self._width, self._hidden = first.out.outputs, first.down.inputs
        self._layers = (CLayer * len(layers))(*map(_layer, layers))
        self._model = CModel(
            self._layers, len(layers), self._width, heads, kv_heads, dim, self._hidden, pages, size, eps
        )

    def __call__(self, x: Tensor, rows: Rows) -> Tensor:
        """Embeddings [T, width] → what the last layer makes of them, in the same memory; keys and values are in their
        pages afterwards."""
        first = self._held[0]
        assert x.shape[1:] == (self._width,), (x.shape, self._width)
        assert x.is_contiguous(), x.stride()
        assert x.dtype == first.cache.dtype == rows.cos.dtype, (x.dtype, first.cache.dtype, rows.cos.dtype)
        assert rows.cos.shape == rows.sin.shape == (len(x), self._dim), (rows.cos.shape, x.shape)
        assert rows.slots.shape == (len(x),), (rows.slots.shape, x.shape)
        compute = (_int8 if first.qkv.is_int8 else _plain).of(x)
        assert compute is not None, "native kernels were there when the layers were bound"
        mixed = self._heads * self._dim
        states = mixed + 2 * self._kv_heads * self._dim
        memory = [x.new_empty(len(x), width) for width in (self._width, states, mixed, self._hidden)]
        memory += int8_rows(len(x), max(self._width, mixed, self._hidden)) if first.qkv.is_int8 else ()
        taken = torch.zeros(len(self._held), dtype=torch.long, device="cpu")
        tensors = [x, rows.cos, rows.sin, rows.slots, rows.spans.table, rows.spans.pages, *memory]
        pointers = [tensor.data_ptr() for tensor in tensors] + ([] if first.qkv.is_int8 else [None, None])
        forward = CForward(*pointers, taken.data_ptr(), len(x), len(rows.spans.table))
        compute(ctypes.addressof(self._model), ctypes.addressof(forward))
        return x


def unavailable(x: Tensor) -> str:
    """Why rows like x cannot be computed here, or an empty string."""
    return "" if _plain.of(x) is not None else native.unavailable() or f"there is no kernel for {x.dtype} on {x.device}"


def _layer(layer: LayerTensors) -> CLayer:
    return CLayer(
        layer.qkv.pointers(layer.qkv_bias),
        layer.out.pointers(layer.out_bias),
        layer.gate_up.pointers(None),
        layer.down.pointers(None),
        *(
            None if tensor is None else tensor.data_ptr()
            for tensor in (layer.attention_norm, layer.q_norm, layer.k_norm, layer.mlp_norm, layer.cache)
        ),
    )


def _check(layers: Sequence[LayerTensors], heads: int) -> None:
    first = layers[0]
    _, _, kv_heads, _, dim = first.cache.shape
    assert heads % kv_heads == 0, f"{kv_heads} heads of keys do not divide {heads}"
    for layer in layers:
        assert layer.cache.shape == first.cache.shape, (layer.cache.shape, first.cache.shape)
        assert layer.cache.is_contiguous(), layer.cache.stride()
        assert layer.qkv.outputs == (heads + 2 * kv_heads) * dim, (layer.qkv.outputs, heads, kv_heads, dim)
        assert layer.qkv.inputs == layer.out.outputs == layer.gate_up.inputs == layer.down.outputs, "one width"
        assert layer.out.inputs == heads * dim, (layer.out.inputs, heads, dim)
        assert layer.gate_up.outputs == 2 * layer.down.inputs, (layer.gate_up.outputs, layer.down.inputs)
        assert layer.gate_up.halves, "gate and up of a unit lie together"
        weights = (layer.qkv, layer.out, layer.gate_up, layer.down)
        assert len({weight.is_int8 for weight in weights}) == 1, "all weights are in one form"
        assert {weight.rows_dtype for weight in weights} == {layer.cache.dtype}, "rows have one dtype"
