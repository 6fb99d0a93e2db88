"""multimodal_gen: a diffusion and multimodal generation server.

Public names load on first use, so that importing the package stays cheap and pulls in no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from multimodal_gen.version import __version__

if TYPE_CHECKING:
    from multimodal_gen import errors as errors
    from multimodal_gen.generator import DiffGenerator as DiffGenerator
    from multimodal_gen.generator import GenerationResult as GenerationResult
    from multimodal_gen.request import SamplingParams as SamplingParams

_PUBLIC = {
    "DiffGenerator": "multimodal_gen.generator",
    "GenerationResult": "multimodal_gen.generator",
    "SamplingParams": "multimodal_gen.request",
    "errors": "multimodal_gen.errors",
}

__all__ = ["DiffGenerator", "GenerationResult", "SamplingParams", "__version__", "errors"]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PUBLIC:
        raise AttributeError(f"module 'multimodal_gen' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if name == "errors" else vars(module)[name]
