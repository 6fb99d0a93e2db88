"""In which form each layer's weight is computed with: as it was read, packed for the processor, or in fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.kernels import blocked_linear, int4_linear, int8_linear, int8_product, packed_linear
from multimodal_gen.kernels.blocked_linear import BlockedWeight
from multimodal_gen.kernels.int4_linear import Int4Weight
from multimodal_gen.kernels.packed_linear import PackedWeight
from multimodal_gen.llm.models.vocabulary import Vocabulary
from multimodal_gen.nn.linear import FusedLinear, Linear, Packed
from multimodal_gen.nn.mlp import SwiGLU

Multiplied = Linear | FusedLinear | Vocabulary


@dataclass(frozen=True)
class Form:
    """One way to hold a weight."""

    pack: Callable[[Tensor], Packed]  # weight [out, in] → what is computed with
    bits: float  # per number of the weight, scales included


Way = Callable[[Multiplied, torch.dtype, bool], Form | None]


def choose(
    decoder: nn.Module, config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> dict[Multiplied, Form]:
    """Layers that are not computed with as they were read.

    Raises: ConfigError for fewer bits elsewhere than on a CPU, or on one that has no such products.
    """
    bits = config.llm_quantize
    if bits != "none" and device.type != "cpu":
        raise ConfigError(
            f"--llm-quantize {bits} is for a CPU, and the device is {device.type}. Leave it out.",
            param="llm_quantize",
        )
    why = int8_product.unavailable(device) if bits == "int8" else ""
    if why:
        raise ConfigError(f"--llm-quantize int8 cannot be had: {why}. Use int8-weights.", param="llm_quantize")
    if device.type != "cpu":
        return {}
    pairs = {module.gate_up for module in decoder.modules() if isinstance(module, SwiGLU)}
    layers = [layer for layer in decoder.modules() if isinstance(layer, Multiplied)]
    found = {layer: WAYS[bits](layer, dtype, layer in pairs) for layer in layers}
    return {layer: form for layer, form in found.items() if form is not None}


def _whole(layer: Multiplied, dtype: torch.dtype, pairs: bool) -> Form | None:
    """All bits, in the order that is read fastest; None: as it was read."""
    bits = 8 * dtype.itemsize
    if not blocked_linear.unavailable(layer.weight.shape, dtype, dtype):
        return Form(partial(BlockedWeight, halves=pairs), bits)
    return None if packed_linear.unavailable(dtype) else Form(PackedWeight, bits)


def _eight(layer: Multiplied, dtype: torch.dtype, pairs: bool) -> Form:
    if blocked_linear.unavailable(layer.weight.shape, torch.int8, dtype):
        return Form(int8_product.Int8Weight, 8)
    return Form(partial(BlockedWeight, dtype=torch.int8, halves=pairs), 8)


def _eight_of_weights(layer: Multiplied, dtype: torch.dtype, pairs: bool) -> Form:
    return Form(int8_linear.Int8Weight, 8)


def _four_of_weights(layer: Multiplied, dtype: torch.dtype, pairs: bool) -> Form:
    """Of layers alone: every token depends on all of the vocabulary, which gets 8."""
    if isinstance(layer, Vocabulary) or not int4_linear.fits(*layer.weight.shape):
        return _eight_of_weights(layer, dtype, pairs)
    return Form(Int4Weight, 4 + 2 * 8 * dtype.itemsize / int4_linear.GROUP)


WAYS: dict[str, Way] = {
    # --llm-quantize → the form of a layer, given the dtype of rows and whether it is gate and up of an activation
    "none": _whole,
    "int8": _eight,
    "int8-weights": _eight_of_weights,
    "int4-weights": _four_of_weights,
}
