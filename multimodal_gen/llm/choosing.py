"""Choosing tokens at random: what rows wish for, as the tensors that `kernels/sampling.py` reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multimodal_gen.kernels.sampling import Wishes, sample
from multimodal_gen.llm.sampling import SamplingRow


def choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """int64 [R]: a token for each row of float32 [R, V], none of whose maxima is infinite or no number."""
    return sample(logits, wishes_of(rows, logits.device))


def wishes_of(rows: Sequence[SamplingRow], device: torch.device) -> Wishes:
    """Temperature, limits and the deciding number of each row."""

    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    asked = [row.sampling for row in rows]
    return Wishes(
        temperature=column([s.temperature for s in asked], torch.float32),
        top_k=column([s.top_k for s in asked], torch.int32),
        top_p=column([s.top_p for s in asked], torch.float64),
        min_p=column([s.min_p for s in asked], torch.float32),
        uniform=column([row.uniform() for row in rows], torch.float64),
    )
