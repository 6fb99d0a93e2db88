"""`mmgen models`: what can run here; `mmgen models MODEL`: one model's card. Reads files only, no torch."""

from __future__ import annotations

from typing import Any

import msgspec

from multimodal_gen.cli import text_models
from multimodal_gen.cli.flags import Arguments, Parser
from multimodal_gen.cli.text import as_json, columns
from multimodal_gen.config import EngineConfig
from multimodal_gen.pipelines import registry
from multimodal_gen.request import ModelCard
from multimodal_gen.settings import load
from multimodal_gen.units import size


def add_arguments(parser: Parser) -> None:
    """Flags of `mmgen models`."""
    parser.usage = "mmgen models [MODEL] [flags]"
    parser.add_argument("model", nargs="?", metavar="MODEL", help="bundled name, local folder or downloaded repository")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: Arguments) -> int:
    """Print the table, or the card of the model named."""
    if arguments.model is None:
        found = overview()
        print(as_json(found) if arguments.json else _table(found))
        return 0
    writes = text_models.is_language_model(arguments.model)
    facts = text_models.card_facts(arguments.model) if writes else card_facts(describe(arguments.model))
    print(as_json(facts) if arguments.json else columns([(name, _shown(value)) for name, value in facts.items()]))
    return 0


def overview() -> dict[str, Any]:
    """Native families, bundled models, and what the fallback covers."""
    return {
        "native": [
            {
                "family": spec.family,
                "title": spec.title,
                "pipeline_classes": list(spec.pipeline_classes),
                "variants": [name for variant in spec.variants for name in variant.names],
            }
            for spec in registry.families()
        ],
        "bundled": [card_facts(describe(name)) for name in registry.bundled()],
        "fallback": {"family": registry.fallback().family, "covers": registry.fallback().title},
        "text": text_models.overview(),
    }


def describe(model: str) -> ModelCard:
    """The card of a model that is on this machine; never downloads. Raises: ModelNotFound, CorruptModel, …"""
    return registry.describe(load(EngineConfig, {"model_path": model, "local_files_only": True}))


def card_facts(card: ModelCard) -> dict[str, Any]:
    """A card and the size of its files as plain data."""
    from pathlib import Path

    from multimodal_gen.weights.checkpoint import verify

    checkpoint = verify(Path(card.path))
    facts: dict[str, Any] = msgspec.to_builtins(card)
    facts["parameters"] = sorted(card.parameters)
    return {
        **facts,
        "weights": {
            "bytes": checkpoint.bytes,
            "parameters": checkpoint.parameters,
            "dtypes": sorted(checkpoint.dtypes),
        },
    }


def _table(found: dict[str, Any]) -> str:
    bundled = [
        (
            card["name"],
            card["family"],
            f"{card['weights']['parameters'] / 1e6:.1f} M parameters, {size(card['weights']['bytes'])}",
            "{width}x{height}, {num_inference_steps} steps".format(**card["defaults"]),
        )
        for card in found["bundled"]
    ]
    native = [(row["family"], row["title"], "runs " + ", ".join(row["pipeline_classes"])) for row in found["native"]]
    return "\n".join(
        [
            "Bundled models (usable by name, offline):",
            columns(bundled, "  "),
            "",
            "Native families (own engine, rows of many requests share each step):",
            columns(native, "  "),
            "",
            "Everything else:",
            f"  {found['fallback']['covers']}",
            "",
            "Give any of them as --model-path: a name above, a folder in diffusers format, or a hub repository id.",
            "",
            "Language models (--llm-path, alone or beside one of the above):",
            columns(_text_rows(found["text"]), "  "),
            "",
            "Give one as --llm-path: a name above, a folder in transformers format, a GGUF file, or a hub repository "
            "id.",
        ]
    )


def _text_rows(text: dict[str, Any]) -> list[tuple[str, str]]:
    known = [(each["name"], "installed" if each["installed"] else each["install"]) for each in text["known"]]
    return [
        *known,
        *((each["family"], "runs " + ", ".join(each["architectures"])) for each in text["families"]),
        ("tool calls", "--tool-call-parser " + ", ".join(text["tool_call_parsers"])),
        ("reasoning", "--reasoning-parser " + ", ".join(text["reasoning_parsers"])),
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
