"""Checks a diffusers-format folder by its headers alone: no tensor is read, no code of the folder runs, no torch.

`verify(folder)` finds what would otherwise fail minutes later inside a loader (a missing shard, a truncated file) and
refuses what a loader would execute (custom pipelines, `auto_map`). It cannot notice changed weight bytes: safetensors
files carry no checksum.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from multimodal_gen.errors import CorruptModel, RemoteCodeRefused
from multimodal_gen.weights.header import TensorInfo, read_header

INDEX_FILE = "model_index.json"
WEIGHT_BASES = ("diffusion_pytorch_model", "model")  # names that diffusers and transformers give to weight files
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_DATA = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class Component:
    """One folder of a pipeline."""

    name: str
    library: str  # "diffusers", "transformers" or a module of diffusers.pipelines
    class_name: str
    files: tuple[Path, ...]  # the safetensors files, in loading order; empty for tokenizers and schedulers
    bytes: int  # of `files`
    parameters: int
    dtypes: frozenset[str]  # safetensors names: F32, BF16, …


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files are all there and whose headers are sound."""

    folder: Path
    pipeline_class: str
    components: dict[str, Component]
    settings: dict[str, Any]  # the other values of model_index.json

    @cached_property
    def bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(part.bytes for part in self.components.values())

    @cached_property
    def parameters(self) -> int:
        """Parameters of all components."""
        return sum(part.parameters for part in self.components.values())

    @cached_property
    def dtypes(self) -> frozenset[str]:
        """Every dtype that a weight is stored in."""
        return frozenset().union(*(part.dtypes for part in self.components.values()))


@dataclass(frozen=True)
class Index:
    """`model_index.json`, checked."""

    pipeline_class: str
    components: dict[str, tuple[str, str]]  # name → (library, class); components set to null are left out
    settings: dict[str, Any]


def verify(folder: Path) -> Checkpoint:
    """Check all files of a model folder.

    Raises: CorruptModel naming the file (relative to `folder`) and what is wrong with it; RemoteCodeRefused for a
    model that wants its own code executed.
    """
    index = read_index(folder)
    if (folder / "pipeline.py").exists():
        raise _remote_code("pipeline.py", "holds the model's own pipeline code")
    parts = {name: _component(folder, name, *entry) for name, entry in index.components.items()}
    return Checkpoint(folder, index.pipeline_class, parts, index.settings)


def read_index(folder: Path) -> Index:
    """Read `model_index.json`. Raises as `verify` does."""
    content = read_json(folder, INDEX_FILE)
    pipeline_class = content.get("_class_name")
    if isinstance(pipeline_class, list):
        raise _remote_code(INDEX_FILE, f"names a pipeline class in a file of the model ({pipeline_class!r})")
    if not isinstance(pipeline_class, str) or not pipeline_class.isidentifier():
        raise CorruptModel(f"{INDEX_FILE}: '_class_name' must be the name of a pipeline class, not {pipeline_class!r}.")
    components: dict[str, tuple[str, str]] = {}
    settings: dict[str, Any] = {}
    for name, value in content.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list):
            settings[name] = value
        elif value != [None, None]:
            components[name] = _entry(folder, name, value)
    return Index(pipeline_class, components, settings)


def read_json(folder: Path, relative: str) -> dict[str, Any]:
    """A JSON object from `folder / relative`. Raises CorruptModel naming `relative`."""
    try:
        content = json.loads((folder / relative).read_bytes())
    except FileNotFoundError:
        raise CorruptModel(f"{relative} is missing: this is not a complete model folder in diffusers format.") from None
    except OSError as error:
        raise CorruptModel(f"{relative} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{relative} is not valid JSON ({error}); download the file again.") from None
    if not isinstance(content, dict):
        raise CorruptModel(f"{relative} must hold a JSON object, not {type(content).__name__}.")
    return content


def _entry(folder: Path, name: str, value: list[Any]) -> tuple[str, str]:
    if len(value) != 2 or not all(isinstance(item, str) for item in value):
        raise CorruptModel(f"{INDEX_FILE}: component {name!r} must be [library, class], not {str(value)[:80]}.")
    library, class_name = value
    if not _is_plain(name):
        raise CorruptModel(f"{INDEX_FILE}: {name!r} is not the name of a folder.")
    if library not in ("diffusers", "transformers") and not _is_diffusers_module(library):
        raise _remote_code(INDEX_FILE, f"takes component {name!r} from {library!r}, not from diffusers or transformers")
    if (folder / name / f"{library}.py").exists():
        raise _remote_code(f"{name}/{library}.py", "is the model's own code")
    return library, class_name


def _component(folder: Path, name: str, library: str, class_name: str) -> Component:
    if not (folder / name).is_dir():
        raise CorruptModel(f"The folder {name}/ is missing, and {INDEX_FILE} lists {class_name} in it.")
    _check_configs(folder, name, class_name)
    files: tuple[Path, ...] = ()
    tensors: dict[str, TensorInfo] = {}
    if _kind(class_name) == "model":
        files, tensors = component_weights(folder, name)
    elif _kind(class_name) == "tokenizer" and not any((folder / name / file).exists() for file in TOKENIZER_DATA):
        raise CorruptModel(f"{name}/ holds no vocabulary; expected one of {', '.join(TOKENIZER_DATA)}.")
    return Component(
        name=name,
        library=library,
        class_name=class_name,
        files=files,
        bytes=sum(file.stat().st_size for file in files),
        parameters=sum(tensor.elements for tensor in tensors.values()),
        dtypes=frozenset(tensor.dtype for tensor in tensors.values()),
    )


def _kind(class_name: str) -> str:
    return next((kind for mark, kind in _KINDS.items() if mark in class_name), "model")


_KINDS = {
    "Scheduler": "scheduler",
    "Tokenizer": "tokenizer",
    "Processor": "processor",
    "FeatureExtractor": "processor",
}
_CONFIGS = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "processor": ("preprocessor_config.json", "processor_config.json"),
    "model": ("config.json",),
}


def _check_configs(folder: Path, name: str, class_name: str) -> None:
    expected = _CONFIGS[_kind(class_name)]
    if not any((folder / name / file).exists() for file in expected):
        raise CorruptModel(f"{name}/{expected[0]} is missing; {class_name} cannot be built without it.")
    for file in sorted((folder / name).glob("*.json")):
        # Old tokenizers keep a bare list here; a weight index is checked with its shards.
        if file.name == "special_tokens_map.json" or file.name.endswith(".index.json"):
            continue
        relative = f"{name}/{file.name}"
        refuse_remote_code(relative, read_json(folder, relative))


def refuse_remote_code(relative: str, content: dict[str, Any]) -> None:
    """Raises: RemoteCodeRefused for a configuration that names code of the model's own."""
    if "auto_map" in content:
        raise _remote_code(relative, "has an 'auto_map', which asks for the model's own code")


def component_weights(folder: Path, name: str) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    """The safetensors files of `folder / name`, checked by their headers, and all tensors. Raises: CorruptModel."""
    for base in WEIGHT_BASES:
        index = f"{name}/{base}.safetensors.index.json"
        if (folder / index).exists():
            return _sharded(folder, name, index)
        single = folder / name / f"{base}.safetensors"
        if single.exists():
            return (single,), read_header(single, f"{name}/{single.name}")
    pickles = sorted(file.name for pattern in PICKLES for file in (folder / name).glob(pattern))
    if pickles:
        raise CorruptModel(
            f"{name}/ holds only pickle weights ({pickles[0]}), which can run code when they are read and are never "
            "opened. Use a version of this model with safetensors files, or convert it."
        )
    raise CorruptModel(f"{name}/{WEIGHT_BASES[0]}.safetensors (or {WEIGHT_BASES[1]}.safetensors) is missing.")


def _sharded(folder: Path, name: str, index: str) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    where = read_json(folder, index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise CorruptModel(f"{index}: 'weight_map' must map tensor names to file names.")
    files, tensors = [], {}
    for shard in sorted(set(where.values())):
        if not _is_plain(shard) or not shard.endswith(".safetensors"):
            raise CorruptModel(f"{index} lists {shard!r}, which is not the name of a safetensors file beside it.")
        path = folder / name / shard
        if not path.exists():
            raise CorruptModel(f"{name}/{shard} is missing, and {index} lists it; download the model again.")
        header = read_header(path, f"{name}/{shard}")
        absent = next((key for key, file in where.items() if file == shard and key not in header), None)
        if absent is not None:
            raise CorruptModel(f"{name}/{shard} lacks the tensor {absent!r} that {index} places in it.")
        files.append(path)
        tensors.update(header)
    return tuple(files), tensors


def _is_plain(name: str) -> bool:
    return bool(name) and "/" not in name and "\\" not in name and "\0" not in name and name not in (".", "..")


def _is_diffusers_module(library: str) -> bool:
    spec = importlib.util.find_spec("diffusers")  # finds, does not import
    roots = [Path(place) / "pipelines" for place in (spec.submodule_search_locations or [])] if spec else []
    return library.isidentifier() and any((root / library).is_dir() for root in roots)


def _remote_code(relative: str, what: str) -> RemoteCodeRefused:
    return RemoteCodeRefused(
        f"{relative} {what}. Code that comes with a model is never executed; use a model that loads with the classes "
        "of diffusers and transformers."
    )
