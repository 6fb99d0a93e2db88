"""Which way of paged attention runs where: one visible table, the first row that fits."""

from __future__ import annotations

import importlib

import torch

from multimodal_gen.attention.paged import PagedBackend

PAGED = (
    # device type ("*": any) → class
    ("cpu", "multimodal_gen.attention.windowed:Windowed"),
    ("*", "multimodal_gen.attention.paged:Reference"),
)


def choose_paged(device: torch.device) -> PagedBackend:
    """The fastest way for a device."""
    target = next(target for kind, target in PAGED if kind in ("*", device.type))
    module, name = target.split(":")
    backend: PagedBackend = vars(importlib.import_module(module))[name]()
    return backend
