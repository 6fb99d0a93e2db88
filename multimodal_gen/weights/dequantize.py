"""Blocks of GGUF files as float32: the commonest types by torch, the others by the gguf package.

torch takes half the time on one thread, and shares large blocks out over all of them; the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.weights.gguf_header import BY_NAME


def dequantize(kind: str, data: memoryview, shape: tuple[int, ...]) -> Tensor:
    """The blocks of whole rows → float32 [shape], in memory of its own."""
    stored = BY_NAME[kind]
    if kind in _BY_TORCH:
        blocks = torch.frombuffer(data, dtype=torch.uint8).view(-1, stored.bytes)
        return _BY_TORCH[kind](blocks).view(shape)
    return _by_package(kind, data, shape[-1] // stored.block * stored.bytes).view(shape)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The 16-bit number at this byte of each block: float32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [blocks, n] → float32 [blocks, 2n]: low halves, then high halves."""
    count, width = packed.shape
    numbers = torch.empty(count, 2 * width)
    numbers[:, :width], numbers[:, width:] = packed & 15, packed >> 4
    return numbers


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8) * _half(blocks, 0)


_BY_TORCH: dict[str, Callable[[Tensor], Tensor]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}


def _by_package(kind: str, data: memoryview, row_bytes: int) -> Tensor:
    from gguf import GGMLQuantizationType, quants

    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, row_bytes)
    return torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType[kind]))
