"""Scale and gate vectors that differ per segment of a packed batch (adaptive layer norm, Peebles and Xie, 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from multimodal_gen.attention.segments import Segments


def scale_segments(x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """x [T, D] · scale [S, D], each segment with its own row of `scale`."""
    out = torch.empty_like(x)
    for run in segments.runs:
        torch.mul(run.tokens(x), scale[run.first : run.last, None], out=run.tokens(out))
    return out


def add_gated(x: Tensor, gate: Tensor, y: Tensor, segments: Segments) -> Tensor:
    """x += gate [S, D] · y [T, D] by segment, in place; returns x [T, D]."""
    for run in segments.runs:
        run.tokens(x).addcmul_(gate[run.first : run.last, None], run.tokens(y))
    return x
