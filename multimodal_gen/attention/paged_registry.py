"""Which way of paged attention runs where: one visible table, the first row that fits."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from multimodal_gen.attention.paged import PagedBackend

PAGED = (
    # device type ("*": any), module that must be installed → class
    ("cpu", "torch", "multimodal_gen.attention.windowed:Windowed"),
    ("cuda", "triton", "multimodal_gen.attention.paged_triton:TritonPaged"),
    ("*", "torch", "multimodal_gen.attention.paged:Reference"),
)


def choose_paged(device: torch.device) -> PagedBackend:
    """The fastest way for a device."""
    rows = (row for row in PAGED if row[0] in ("*", device.type))
    target = next(target for _, needs, target in rows if importlib.util.find_spec(needs) is not None)
    module, name = target.split(":")
    backend: PagedBackend = vars(importlib.import_module(module))[name]()
    return backend
