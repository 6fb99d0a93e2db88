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
    from multimodal_gen.llm.asking import TextParams as TextParams
    from multimodal_gen.llm_api import LLM as LLM
    from multimodal_gen.request import SamplingParams as SamplingParams
    from multimodal_gen.text import TextOutput as TextOutput

_PUBLIC = {
    "DiffGenerator": "multimodal_gen.generator",
    "GenerationResult": "multimodal_gen.generator",
    "LLM": "multimodal_gen.llm_api",
    "SamplingParams": "multimodal_gen.request",
    "TextOutput": "multimodal_gen.text",
    "TextParams": "multimodal_gen.llm.asking",
    "errors": "multimodal_gen.errors",
}

__all__ = [
    "LLM",
    "DiffGenerator",
    "GenerationResult",
    "SamplingParams",
    "TextOutput",
    "TextParams",
    "__version__",
    "errors",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PUBLIC:
        raise AttributeError(f"module 'multimodal_gen' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if name == "errors" else vars(module)[name]
