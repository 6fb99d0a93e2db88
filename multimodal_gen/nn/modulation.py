"""Scale and gate vectors that differ per segment of a packed batch (adaptive layer norm, Peebles and Xie, 2022).

Callers fold a norm's weight into the few scale or gate rows, so the many tokens are touched once less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multimodal_gen.attention.segments import Segments
from multimodal_gen.nn.norm import layer_normalize, rms_normalize


def scale_segments_(x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """x [T, D] *= scale [S, D], each segment with its own row; returns x."""
    for run in segments.runs:
        run.tokens(x).mul_(scale[run.first : run.last, None])
    return x


def norm_scaled(x: Tensor, scale: Tensor, eps: float, segments: Segments) -> Tensor:
    """x / rms(x) · scale: x [T, D], scale [S, D] → [T, D]."""
    return scale_segments_(rms_normalize(x, eps), scale, segments)


def norm_modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float, segments: Segments) -> Tensor:
    """layer_normalize(x) · scale + shift: x [T, D], scale and shift float32 [S, D] → [T, D]."""
    parts = x.split(segments.lengths)
    normed = [layer_normalize(part, scale[i], shift[i], eps) for i, part in enumerate(parts)]
    return normed[0] if len(normed) == 1 else torch.cat(normed)


def gate_(x: Tensor, gate: Tensor, y: Tensor, segments: Segments) -> Tensor:
    """x [T, D] += gate · y, y [T, D], gate float32 [S, D], in float32 and rounded once; returns x."""
    for run in segments.runs:
        run.tokens(x).addcmul_(run.tokens(y), gate[run.first : run.last, None])
    return x


def add_gated_(x: Tensor, gate: Tensor, y: Tensor, eps: float, segments: Segments) -> Tensor:
    """x [T, D] += gate [S, D] · y / rms(y), y [T, D]; returns x."""
    y = rms_normalize(y, eps)
    for run in segments.runs:
        run.tokens(x).addcmul_(gate[run.first : run.last, None], run.tokens(y))
    return x
