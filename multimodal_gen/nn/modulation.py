"""Scale and gate vectors that differ per segment of a packed batch (adaptive layer norm, Peebles and Xie, 2022).

Callers fold a norm's weight into the few scale or gate rows, so the many tokens are touched once less.
"""

from __future__ import annotations

from torch import Tensor

from multimodal_gen.attention.segments import Segments
from multimodal_gen.nn.norm import rms_normalize


def scale_segments_(x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """x [T, D] *= scale [S, D], each segment with its own row; returns x."""
    for run in segments.runs:
        run.tokens(x).mul_(scale[run.first : run.last, None])
    return x


def norm_scaled(x: Tensor, scale: Tensor, eps: float, segments: Segments) -> Tensor:
    """x / rms(x) · scale: x [T, D], scale [S, D] → [T, D]."""
    return scale_segments_(rms_normalize(x, eps), scale, segments)


def add_gated_(x: Tensor, gate: Tensor, y: Tensor, eps: float, segments: Segments) -> Tensor:
    """x [T, D] += gate [S, D] · y / rms(y), y [T, D]; returns x."""
    y = rms_normalize(y, eps)
    for run in segments.runs:
        run.tokens(x).addcmul_(gate[run.first : run.last, None], run.tokens(y))
    return x
