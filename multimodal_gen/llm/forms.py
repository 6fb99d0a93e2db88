"""In which form each layer's weight is computed with: as it was read, packed for the processor, or in fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.kernels import int4_linear
from multimodal_gen.kernels.int4_linear import Int4Weight
from multimodal_gen.kernels.int8_linear import Int8Weight
from multimodal_gen.kernels.packed_linear import PackedWeight, unavailable
from multimodal_gen.llm.models.vocabulary import Vocabulary
from multimodal_gen.nn.linear import FusedLinear, Linear, Packed

Multiplied = Linear | FusedLinear | Vocabulary


@dataclass(frozen=True)
class Form:
    """One way to hold a weight."""

    pack: Callable[[Tensor], Packed]  # weight [out, in] → what is computed with
    bits: float  # per number of the weight, scales included


def choose(
    decoder: nn.Module, config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> dict[Multiplied, Form]:
    """Layers that are not computed with as they were read.

    In 4 bits layers alone are held: every token depends on all of the vocabulary, which gets 8.

    Raises: ConfigError for fewer bits elsewhere than on a CPU.
    """
    bits = config.llm_quantization
    if bits != "none" and device.type != "cpu":
        raise ConfigError(
            f"--llm-quantization {bits} is for a CPU, and the device is {device.type}. Leave it out.",
            param="llm_quantization",
        )
    layers = [layer for layer in decoder.modules() if isinstance(layer, Multiplied)]
    if bits == "int4":
        return {layer: _narrowest(layer, dtype) for layer in layers}
    if bits == "int8":
        return dict.fromkeys(layers, INT8)
    if device.type != "cpu" or unavailable(dtype):
        return {}
    return {layer: Form(PackedWeight, 8 * dtype.itemsize) for layer in layers}


INT8 = Form(Int8Weight, 8)


def _narrowest(layer: Multiplied, dtype: torch.dtype) -> Form:
    if isinstance(layer, Vocabulary) or not int4_linear.fits(*layer.weight.shape):
        return INT8
    return Form(Int4Weight, 4 + 2 * 8 * dtype.itemsize / int4_linear.GROUP)
