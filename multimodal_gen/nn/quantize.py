"""Kinds of fewer bits for weights (`--quantize`), and where each can be computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal_gen.errors import ConfigError
from multimodal_gen.kernels import blocked_linear, fp8_product, int4_linear, int8_linear, int8_product
from multimodal_gen.kernels.blocked_linear import BlockedWeight
from multimodal_gen.nn.forms import Fewer, Form, Formed
from multimodal_gen.nn.linear import Packed


@dataclass(frozen=True)
class Kind:
    """One row of the table below."""

    pack: Callable[[Tensor, bool], Packed]  # weight [out, in], and whether its halves are wanted together
    bits: Callable[[torch.dtype], float]  # per number, scales included, by the dtype of the weight as it was read
    fits: Callable[[int, int, torch.device], bool]  # whether a weight [out, in] can be held so on a device
    unavailable: Callable[[torch.device], str]  # why not on a device, or an empty string


def _anywhere(device: torch.device) -> str:
    return ""


def _on_a_cpu(device: torch.device) -> str:
    return "" if device.type == "cpu" else "torch computes with such weights on a CPU only"


def _int8(weight: Tensor, halves: bool) -> Packed:
    """By our own kernel where it takes the weight: 1.1 to 2 times as fast on a Zen 5, from 32 to 1088 rows."""
    if weight.is_cpu and not blocked_linear.unavailable(weight.shape, torch.int8, weight.dtype):
        return BlockedWeight(weight, torch.int8, halves)
    return int8_product.Int8Weight(weight)


def _in_order(pack: Callable[[Tensor], Packed]) -> Callable[[Tensor, bool], Packed]:
    """Of forms that do not lay halves together."""
    return lambda weight, _: pack(weight)


KINDS = {
    "int8": Kind(_int8, lambda _: 8, int8_product.fits, int8_product.unavailable),
    "fp8": Kind(_in_order(fp8_product.Fp8Weight), lambda _: 8, fp8_product.fits, fp8_product.unavailable),
    "int8-weights": Kind(_in_order(int8_linear.Int8Weight), lambda _: 8, lambda *_: True, _anywhere),
    "int4-weights": Kind(
        _in_order(int4_linear.Int4Weight),
        lambda dtype: 4 + 2 * 8 * dtype.itemsize / int4_linear.GROUP,
        lambda rows, columns, _: int4_linear.fits(rows, columns),
        _on_a_cpu,
    ),
}


def fewer_bits(quantize: str, device: torch.device) -> Fewer:
    """What a layer takes under `--quantize`.

    Raises: ConfigError where the device cannot compute it.
    """
    if quantize == "none":
        return lambda *_: None
    kind = KINDS[quantize]
    why = kind.unavailable(device)
    if why:
        others = ", ".join(name for name, other in KINDS.items() if not other.unavailable(device))
        raise ConfigError(f"--quantize {quantize} cannot be had on {device}: {why}. Here: {others}.", param="quantize")

    def form(layer: Formed, halves: bool) -> Form | None:
        weight = layer.weight
        rows, columns = weight.shape
        if not kind.fits(rows, columns, device):
            return None
        return Form(lambda weight: kind.pack(weight, halves), kind.bits(weight.dtype), exact=False, passing=True)

    return form
