"""A decoder's layers as one native call (`kernels/decoder_layers.py`), where they are in the forms that it takes."""

from __future__ import annotations

from torch import Tensor, nn

from multimodal_gen.kernels.blocked_linear import BlockedWeight
from multimodal_gen.kernels.decoder_layers import DecoderLayers, LayerTensors
from multimodal_gen.kernels.paged_attention import unavailable
from multimodal_gen.llm.kv_cache import KVCache
from multimodal_gen.llm.models.layer import Layer
from multimodal_gen.nn.linear import FusedLinear, Linear


def bind(layers: nn.ModuleList, cache: KVCache) -> DecoderLayers | None:
    """One call for these layers over this cache, until weights or cache are others; None where it cannot compute them:
    ranks share a layer, a weight is in another form, a head is too wide."""
    first = layers[0]
    assert isinstance(first, Layer)
    pool, qkv = cache.layers[0], first.attention.qkv
    if not pool.is_cpu or unavailable(pool.shape[-1], pool.dtype):
        return None
    bound = list[LayerTensors]()
    for layer, pages in zip(layers, cache.layers, strict=True):
        assert isinstance(layer, Layer)
        tensors = _tensors(layer, pages)
        if tensors is None:
            return None
        bound.append(tensors)
    if len({weight.is_int8 for layer in bound for weight in (layer.qkv, layer.out, layer.gate_up, layer.down)}) > 1:
        return None
    return DecoderLayers(bound, qkv.heads, first.attention_norm.eps)


def _tensors(layer: Layer, pages: Tensor) -> LayerTensors | None:
    attention, mlp = layer.attention, layer.mlp
    qkv, out, gate_up, down = (_blocked(each) for each in (attention.qkv, attention.out, mlp.gate_up, mlp.down))
    if qkv is None or out is None or gate_up is None or down is None:
        return None
    if attention.out.group.size > 1 or mlp.down.group.size > 1:
        return None
    return LayerTensors(
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
        qkv_bias=attention.qkv.bias,
        out_bias=attention.out.bias,
        attention_norm=layer.attention_norm.weight,
        q_norm=None if attention.norm is None else attention.norm.q.weight,
        k_norm=None if attention.norm is None else attention.norm.k.weight,
        mlp_norm=layer.mlp_norm.weight,
        cache=pages,
    )


def _blocked(layer: Linear | FusedLinear) -> BlockedWeight | None:
    return layer.packed if isinstance(layer.packed, BlockedWeight) else None
