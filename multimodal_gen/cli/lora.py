"""`mmgen lora ls` and `mmgen lora inspect FILE`: what an adapter file holds, and which families it fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal_gen.cli.flags import Arguments, Parser
from multimodal_gen.cli.text import as_json, columns
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import AdapterError, ConfigError, did_you_mean
from multimodal_gen.llm.adapter_target import DECODER
from multimodal_gen.lora.names import fits
from multimodal_gen.lora.sources import DEFAULT_ROOT, resolve_path
from multimodal_gen.pipelines import registry
from multimodal_gen.settings import load
from multimodal_gen.units import size

if TYPE_CHECKING:
    from multimodal_gen.lora.adapter import Parsed
    from multimodal_gen.lora.file import AdapterFile

ACTIONS = ("ls", "inspect")
LANGUAGE = "language models"


def add_arguments(parser: Parser) -> None:
    """Flags of `mmgen lora`."""
    parser.usage = "mmgen lora ls [FOLDER …] | mmgen lora inspect FILE [--model-path MODEL]"
    parser.add_argument("action", nargs="?", metavar="ls|inspect", help="list folders, or look into one file")
    parser.add_argument("paths", nargs="*", metavar="PATH", help=f"folders (default: {DEFAULT_ROOT}/), or the file")
    parser.add_argument(
        "--model-path", metavar="MODEL", help="also say whether the file fits this model on this machine"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: Arguments) -> int:
    """Print what was found."""
    if arguments.action not in ACTIONS:
        given = str(arguments.action or "")
        raise ConfigError(f"mmgen lora takes `ls` or `inspect FILE`, got {given!r}.{did_you_mean(given, ACTIONS)}")
    if arguments.action == "ls":
        return _list(arguments)
    if len(arguments.paths) != 1:
        raise ConfigError(f"mmgen lora inspect takes one FILE, got {len(arguments.paths)}.")
    facts = inspect(Path(arguments.paths[0]), arguments.model_path)
    print(as_json(facts) if arguments.json else columns([(name, _shown(value)) for name, value in facts.items()]))
    return 0


def inspect(path: Path, model: str | None = None) -> dict[str, Any]:
    """Everything that can be said of a file. Raises: the AdapterError family; with `model`, as describing it."""
    from multimodal_gen.lora.bind import bind
    from multimodal_gen.lora.file import read_adapter
    from multimodal_gen.lora.formats.registry import parse

    file = read_adapter(resolve_path(str(path), None), EngineConfig().max_lora_mb << 20)
    parsed = parse(file)
    facts = _facts(file, parsed)
    if model is not None:
        bound = bind(parsed, _spellings(model), allow_partial=True, name=file.name)
        facts["model"] = {"name": model, "modules": bound.modules, "skipped": list(bound.skipped)}
    return facts


def _facts(file: AdapterFile, parsed: Parsed) -> dict[str, Any]:
    updates = [entry.update for entry in parsed.entries]
    named = {entry.tree: None for entry in parsed.entries}
    return {
        "file": file.name,
        "bytes": file.size,
        "sha256": file.sha256,
        "format": parsed.format,
        "modules": len({entry.source for entry in parsed.entries}),
        "ranks": sorted({update.rank for update in updates if update.rank}),
        "targets": [tree or "not named" for tree in named],
        "merge_only": next((update.merge_only for update in updates if update.merge_only), None),
        "families": _families(parsed),
        "strange": parsed.strange,
    }


def _families(parsed: Parsed) -> dict[str, str]:
    """Native families that know the file's modules → how many of them."""
    modules = {(entry.module, entry.flat) for entry in parsed.entries}
    known = {spec.family: spec.adapters for spec in registry.families()}
    if all(entry.tree is None for entry in parsed.entries):  # what names a tree is of a model with several
        known[LANGUAGE] = (DECODER,)
    found = {}
    for family, targets in known.items():
        count = max((fits(target, modules) for target in targets), default=0)
        if count:
            found[family] = f"{count} of {len(modules)} modules"
    return found


def _spellings(model: str) -> dict[str, Any]:
    """The trees of a model by the headers of its files."""
    from multimodal_gen.lora.bind import Spellings
    from multimodal_gen.lora.names import TreeLayout
    from multimodal_gen.lora.tree import canonical_names
    from multimodal_gen.weights.checkpoint import verify
    from multimodal_gen.weights.header import read_header

    card = registry.describe(load(EngineConfig, {"model_path": model, "local_files_only": True}))
    components = verify(Path(card.path)).components
    trees = {}
    for target in registry.find(card.pipeline_class).adapters:
        if target.folder not in components:
            continue
        shapes = {
            key: info.shape
            for file in components[target.folder].files
            for key, info in read_header(file, file.name).items()
        }
        names = canonical_names(target, shapes)
        trees[target.tree] = Spellings(TreeLayout(target, {name: shapes[key] for name, key in names.items()}))
    if not trees:
        raise AdapterError(f"{card.name} ({card.pipeline_class}) takes no adapters: no native family runs it.")
    return trees


def _list(arguments: Arguments) -> int:
    folders = [Path(path) for path in arguments.paths or [DEFAULT_ROOT]]
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None:
        raise ConfigError(f"There is no folder {missing}; name the one that holds your adapters.")
    rows = [_row(file) for folder in folders for file in sorted(folder.rglob("*.safetensors")) if file.is_file()]
    if arguments.json:
        print(as_json({"adapters": rows}))
    elif rows:
        print(columns([(row["path"], size(row["bytes"]), row["format"], row["fits"]) for row in rows]))
    else:
        print(f"No safetensors files in {', '.join(map(str, folders))}.")
    return 0


def _row(file: Path) -> dict[str, Any]:
    row = {"path": str(file), "bytes": file.stat().st_size}
    try:
        facts = inspect(file)
    except AdapterError as error:
        return {**row, "format": error.code, "fits": error.message}
    ranks = f"rank {', '.join(map(str, facts['ranks']))}" if facts["ranks"] else "no rank"
    return {**row, "format": f"{facts['format']}, {ranks}", "fits": ", ".join(facts["families"]) or "no native family"}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
