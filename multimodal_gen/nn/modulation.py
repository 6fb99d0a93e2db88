"""Scale and gate vectors that differ per segment of a packed batch (adaptive layer norm, Peebles and Xie, 2022).

A norm's weight is folded into the few scale or gate rows, so the many tokens are touched once less.
"""

from __future__ import annotations

from torch import Tensor

from multimodal_gen.attention.segments import Segments
from multimodal_gen.nn.norm import RMSNorm, rms_normalize


def scale_segments_(x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """x [T, D] *= scale [S, D], each segment with its own row; returns x."""
    for run in segments.runs:
        run.tokens(x).mul_(scale[run.first : run.last, None])
    return x


def norm_scaled(x: Tensor, norm: RMSNorm, scale: Tensor, segments: Segments) -> Tensor:
    """norm(x) · scale: x [T, D], scale [S, D] → [T, D]."""
    return scale_segments_(rms_normalize(x, norm.eps), scale * norm.weight, segments)


def add_gated_(x: Tensor, gate: Tensor, y: Tensor, norm: RMSNorm, segments: Segments) -> Tensor:
    """x [T, D] += gate [S, D] · norm(y [T, D]); returns x."""
    y, gate = rms_normalize(y, norm.eps), gate * norm.weight
    for run in segments.runs:
        run.tokens(x).addcmul_(gate[run.first : run.last, None], run.tokens(y))
    return x
