"""Adapters of language models on several ranks; the function runs on every rank of a mesh."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from multimodal_gen.adapters import SwapLoras
from multimodal_gen.config import EngineConfig
from multimodal_gen.llm.card import describe
from multimodal_gen.llm.core import TextCore
from multimodal_gen.lora.sources import make_source
from multimodal_gen.parallel.mesh import Mesh
from tests.support.text_core import Driver, ask

PROMPTS = ((5, 9, 33, 120, 7), (200, 4, 11))
NAMES = ("a", "b")


def answers(mesh: Mesh, path: str, adapters: str, places: int) -> dict[str, Tensor]:
    """Tokens of the base model and of two adapters, all together."""
    config = EngineConfig(
        llm_path=path,
        model_path="none",
        llm_dtype="float32",
        device="cpu",
        kv_cache_memory=1 << 20,
        max_loras_per_batch=places,
        tp_size=mesh.degrees.tp,
    )
    core = TextCore(describe(config), config, mesh, clock=lambda: 0.0)
    sources = tuple(make_source(name, str(Path(adapters, f"{name}.safetensors")), None) for name in NAMES)
    core.adapters.change(SwapLoras(sources=sources))
    digests = {info.nickname: info.digest for info in core.adapters.state.loaded} | {"base": None}
    driver = Driver(core)
    for name, digest in digests.items():
        driver.add(*[ask(f"{name} {i}", prompt, 8, adapter=digest) for i, prompt in enumerate(PROMPTS)])
    heard = driver.run()
    assert core.adapters.held == 0
    return {name: torch.tensor(heard.ids(name)) for name in heard.outputs}
