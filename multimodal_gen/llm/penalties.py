"""What requests change in their logits before anything is chosen: penalties, biases, tokens that must not come yet.

Only the entries of the tokens concerned are touched, all rows in one gather and one scatter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from multimodal_gen.llm.sampling import SamplingRow


def penalise(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Repetition (Keskar et al., 2019), presence and frequency penalties, in place on float32 [R, V]."""
    places, counts, rates = [], [], []
    for at, row in enumerate(rows):
        if row.seen is None or not row.seen.ids:
            continue
        places.append(np.array(row.seen.ids) + at * logits.shape[1])
        counts.append(np.array(row.seen.counts))
        s = row.sampling
        rate = np.array([s.repetition_penalty, s.presence_penalty, s.frequency_penalty], np.float32)
        rates.append(np.broadcast_to(rate, (len(row.seen.ids), 3)))
    if not places:
        return
    flat, device = logits.view(-1), logits.device
    where = torch.from_numpy(np.concatenate(places)).to(device)
    count = torch.from_numpy(np.concatenate(counts)).to(device)
    repetition, presence, frequency = torch.from_numpy(np.concatenate(rates)).to(device).unbind(1)
    values = flat[where]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= presence * (count > 0) + frequency * count
    flat[where] = values


def add_biases(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """`logit_bias` of every row, in place on float32 [R, V]."""
    places, values = list[int](), list[float]()
    for at, row in enumerate(rows):
        if row.sampling.logit_bias:
            places += (token + at * logits.shape[1] for token in row.sampling.logit_bias)
            values += row.sampling.logit_bias.values()
    if places:
        flat, where = logits.view(-1), torch.tensor(places).to(logits.device)
        flat[where] += torch.tensor(values, dtype=torch.float32).to(logits.device)


def forbid(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """End tokens of rows that have fewer than min_tokens, in place on float32 [R, V]; `grammar.masks` does it where
    there is a grammar."""
    places = [
        token + at * logits.shape[1] for at, row in enumerate(rows) if row.matcher is None for token in row.forbidden
    ]
    if places:
        logits.view(-1)[torch.tensor(places).to(logits.device)] = -torch.inf
