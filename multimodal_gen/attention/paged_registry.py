"""Which way of paged attention runs where: one visible table, the first row that fits."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from multimodal_gen.attention.paged import PagedBackend

PAGED = (
    # device type ("*": any), module that must be installed → class
    ("cpu", "torch", "multimodal_gen.attention.paged_native:NativePaged"),
    ("cpu", "torch", "multimodal_gen.attention.windowed:Windowed"),
    ("cuda", "triton", "multimodal_gen.attention.paged_triton:TritonPaged"),
    ("*", "torch", "multimodal_gen.attention.paged:Reference"),
)


def choose_paged(device: torch.device, head_dim: int, dtype: torch.dtype) -> PagedBackend:
    """The fastest way for such heads on a device."""
    rows = (row for row in PAGED if row[0] in ("*", device.type) and importlib.util.find_spec(row[1]) is not None)
    made = (_class(target) for _, _, target in rows)
    backend: PagedBackend = next(kind for kind in made if kind.fits(head_dim, dtype))()
    return backend


def _class(target: str) -> type[PagedBackend]:
    module, name = target.split(":")
    found: type[PagedBackend] = vars(importlib.import_module(module))[name]
    return found
