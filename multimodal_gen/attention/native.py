"""Attention in C++ compiled for this processor (kernels/packed_attention.py): whole batches at once, any lengths."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from multimodal_gen.attention.sdpa import SdpaAttention
from multimodal_gen.attention.segments import Segments
from multimodal_gen.kernels.packed_attention import packed_attention, packed_attention_lse, takes, unavailable


class NativeAttention:
    """For float32, and for bfloat16 where the processor multiplies it; other dtypes go to `sdpa`."""

    name = "native"
    gives_lse = True

    def __init__(self) -> None:
        self.other = SdpaAttention()

    @staticmethod
    def unavailable(device: torch.device) -> str:
        """CPUs with AVX-512, where the kernels could be compiled."""
        return unavailable(torch.float32) if device.type == "cpu" else "it is for CPUs"

    @staticmethod
    def preferred(device: torch.device) -> bool:
        """Where it was measured to be faster: AMD with AVX-512 and no tiles."""
        return amd_without_tiles()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v [T, H, D] → [T, H, D]."""
        if not takes(q):
            return self.other(q, k, v, segments)
        return packed_attention(q, k, v, segments.lengths, segments.lengths)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments) -> tuple[Tensor, Tensor]:
        """q [T, H, D], k and v [K, H, D] → [T, H, D], float32 [T, H]."""
        if not takes(q):
            return self.other.with_lse(q, k, v, segments, keys)
        return packed_attention_lse(q, k, v, segments.lengths, keys.lengths)


def wins(q: Tensor) -> bool:
    """Whether the kernel computes on tensors like q, faster than torch on a processor of this kind."""
    return takes(q) and amd_without_tiles()


@functools.cache
def amd_without_tiles() -> bool:
    """Whether this is an AMD processor with AVX-512: there the BLAS inside torch's own kernel is slow."""
    found = torch.cpu.get_capabilities()
    name = str(found.get("cpu_name", ""))
    return name.startswith("AMD") and bool(found.get("avx512_f")) and not found.get("amx_tile")
