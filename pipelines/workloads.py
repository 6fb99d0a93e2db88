"""Denoising steps that rooflines are drawn for (`mmgen bench --roofline`), a line each. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from multimodal_gen.kernels.costs import Call
from multimodal_gen.pipelines.wan import work as wan
from multimodal_gen.pipelines.zimage import work as zimage


class Workload(NamedTuple):
    """One step."""

    title: str
    step: Callable[[], list[Call]]
    gpu: bool  # sized for a GPU; the others are what a CPU can compute in a minute


_Z_IMAGE = partial(zimage.step, zimage.SIX_BILLION)
_WAN = partial(wan.step, wan.FOURTEEN_BILLION)

# Wan pads its texts to 512 tokens. GPUs attend to all of them, a CPU to those that differ (attention/cross.py).
WORKLOADS = (
    Workload("Z-Image 6B, 1024 x 1024, caption of 64 tokens", partial(_Z_IMAGE, 1024, 1024, 64), True),
    Workload("Z-Image 6B, 1024 x 1024, under guidance", partial(_Z_IMAGE, 1024, 1024, 64, 2), True),
    Workload("Wan2.2 A14B, 832 x 480, 81 frames, under guidance", partial(_WAN, 832, 480, 81, 512), True),
    Workload("Wan2.2 A14B, 1280 x 720, 81 frames, under guidance", partial(_WAN, 1280, 720, 81, 512), True),
    Workload("Z-Image 6B, 256 x 256, caption of 64 tokens", partial(_Z_IMAGE, 256, 256, 64), False),
    Workload("Wan2.2 A14B, 256 x 160, 9 frames, under guidance", partial(_WAN, 256, 160, 9, 64), False),
)
