"""What `mmgen models` and `mmgen doctor` know of language models. Reads files only; torch where a device is asked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import msgspec

from multimodal_gen.config import NO_MODEL, EngineConfig
from multimodal_gen.llm import sources
from multimodal_gen.llm.card import describe
from multimodal_gen.llm.checkpoint import CONFIG
from multimodal_gen.llm.models.registry import families
from multimodal_gen.llm.parsers import reasoning
from multimodal_gen.llm.parsers.tools import registry as tools
from multimodal_gen.text import TextCard
from multimodal_gen.units import size


def overview() -> dict[str, Any]:
    """Families, models that are known by name, and the parsers of what they write."""
    return {
        "families": [{"family": each.name, "architectures": list(each.architectures)} for each in families()],
        "known": [
            {
                "name": name,
                "installed": importlib.util.find_spec(package.module) is not None,
                "install": package.install,
            }
            for name, package in sources.NAMES.items()
        ],
        "tool_call_parsers": sorted(tools.FORMATS),
        "reasoning_parsers": sorted(reasoning.FORMATS),
    }


def is_language_model(model: str) -> bool:
    """Whether a name or path is one of a language model; what is neither is for the model of pictures to refuse."""
    if model in sources.NAMES or model.endswith(".gguf"):
        return True
    folder = Path(model)
    return (
        folder.is_dir()
        and not (folder / "model_index.json").exists()
        and ((folder / CONFIG).exists() or any(folder.glob("*.gguf")))
    )


def card_facts(model: str) -> dict[str, Any]:
    """The card of a language model that is on this machine. Raises: ModelNotFound, CorruptModel, …"""
    config = EngineConfig(model_path=NO_MODEL, llm_path=model, local_files_only=True)
    facts: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(describe(config)))
    return facts


def fit(config: EngineConfig, report: dict[str, Any]) -> None:
    """Add to the doctor's report what the language model needs on this machine; a problem where that is not there."""
    from multimodal_gen.llm.kv_cache import KVCache
    from multimodal_gen.llm.sizing import share
    from multimodal_gen.memory.free import free_bytes
    from multimodal_gen.nn.precision import resolve_device, resolve_dtype

    card: TextCard = describe(msgspec.structs.replace(config, local_files_only=True))
    device = resolve_device(config.device)
    dtype, free = resolve_dtype(config.llm_dtype, device), free_bytes(device)
    weights = card.parameters * dtype.itemsize
    page = KVCache.page_bytes(card.layers, config.kv_page_size, card.kv_heads, card.head_dim, dtype)
    facts: dict[str, Any] = {
        "name": card.name,
        "family": card.family,
        "parameters": card.parameters,
        "bytes": card.weight_bytes,
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": weights,
        "free_bytes": free,
        "fits": weights < free,
    }
    report["text_model"] = facts
    if weights >= free:
        report["problems"].append(
            f"{card.name} needs about {size(weights)} on {device} and {size(free)} are free. Close other programs, or "
            "choose a smaller model or an --llm-dtype of two bytes."
        )
        return
    room = share(card, config, page, free - weights, device.type)
    facts |= {"context": room.context, "kv_pages": room.pages, "kv_bytes": room.pages * page}


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The doctor's lines."""
    needed = f"{size(facts['weight_bytes'])} of weights in {facts['dtype']}"
    if "kv_bytes" in facts:
        needed += f", {size(facts['kv_bytes'])} of keys and values for texts of up to {facts['context']:,} tokens"
    return [
        ("language model", f"{facts['name']} ({facts['family']}), {facts['parameters']:,} parameters"),
        ("it needs", f"{needed}: {'fits' if facts['fits'] else 'does NOT fit'}"),
    ]
