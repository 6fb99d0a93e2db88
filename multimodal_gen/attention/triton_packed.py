"""Attention on CUDA in Triton (kernels/packed_attention.py): whole batches in one launch, any lengths."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from multimodal_gen.attention.sdpa import SdpaAttention
from multimodal_gen.attention.segments import Segments
from multimodal_gen.kernels import native
from multimodal_gen.kernels.packed_attention import packed_attention, packed_attention_lse


class TritonAttention:
    """Wider heads than the kernel has registers for go to `sdpa`."""

    name = "triton"
    gives_lse = True

    def __init__(self) -> None:
        from multimodal_gen.kernels.gpu.packed_attention import MOST

        self.other = SdpaAttention()
        self._most = MOST

    @staticmethod
    def unavailable(device: torch.device) -> str:
        """CUDA, where Triton is installed."""
        if device.type != "cuda":
            return "it is for CUDA"
        if native.switched_off():
            return "it is switched off (--kernels torch)"
        return "" if importlib.util.find_spec("triton") else "the package triton is not installed"

    @staticmethod
    def preferred(device: torch.device) -> bool:
        """Nowhere: on an H100 cuDNN's kernel, which `sdpa` takes, is 1.4 times as fast (decision 040)."""
        return False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v [T, H, D] → [T, H, D]."""
        if q.shape[2] > self._most[q.dtype]:
            return self.other(q, k, v, segments)
        return packed_attention(q, k, v, segments.lengths, segments.lengths)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments) -> tuple[Tensor, Tensor]:
        """q [T, H, D], k and v [K, H, D] → [T, H, D], float32 [T, H]."""
        if q.shape[2] > self._most[q.dtype]:
            return self.other.with_lse(q, k, v, segments, keys)
        return packed_attention_lse(q, k, v, segments.lengths, keys.lengths)
