"""The files of a language model, checked by their headers: no tensor is read, no code of the folder runs, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from multimodal_gen.errors import CorruptModel
from multimodal_gen.llm.models import registry
from multimodal_gen.llm.models.config import DecoderConfig, Keys
from multimodal_gen.llm.models.family import Family
from multimodal_gen.llm.models.names import EMBEDDING, FREQUENCIES, HEAD, canonical
from multimodal_gen.weights.checkpoint import component_weights, read_json, refuse_remote_code
from multimodal_gen.weights.gguf_header import read_gguf
from multimodal_gen.weights.header import TensorInfo

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
Format = Literal["safetensors", "gguf"]


@dataclass(frozen=True)
class TextCheckpoint:
    """A model whose files are all there and whose headers are sound."""

    path: Path  # the folder, or the GGUF file
    format: Format
    family: Family
    config: DecoderConfig
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]  # by transformers' names
    metadata: dict[str, Any]  # config.json, or what the GGUF file says of itself
    generation: dict[str, Any]  # generation_config.json, empty where there is none
    tokenizer: dict[str, Any]  # tokenizer_config.json, likewise

    @property
    def parameters(self) -> int:
        """Numbers of all weights that are used."""
        unused = {HEAD, FREQUENCIES} if self.config.tied else {FREQUENCIES}
        return sum(info.elements for name, info in self.tensors.items() if name not in unused)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in self.files)


def read(path: Path, kind: Format) -> TextCheckpoint:
    """Check all files of a model.

    Raises: CorruptModel naming the file and what is wrong with it; RemoteCodeRefused for a folder that wants its own
    code executed; ConfigError for a model that cannot be computed here.
    """
    return _gguf(path) if kind == "gguf" else _folder(path)


def read_config(folder: Path) -> tuple[Family, DecoderConfig, dict[str, Any]]:
    """The family and the sizes of a model in transformers' format, and all of its config.json. Raises: as `read`."""
    content, shown = _json(folder, CONFIG), f"{folder.name}/{CONFIG}"
    architectures = content.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise CorruptModel(f"{shown}: 'architectures' must be a list of one name, not {str(architectures)[:80]}.")
    family = registry.by_architecture(architectures[0], shown)
    config = family.from_json(Keys(content, shown))
    if content.get("quantization_config") is not None:
        raise CorruptModel(
            f"{shown}: weights in the format of 'quantization_config' are not read. Use the model's safetensors in "
            "bf16, or a GGUF file."
        )
    return family, config, content


def _folder(folder: Path) -> TextCheckpoint:
    family, config, content = read_config(folder)
    generation, tokenizer = _json(folder, GENERATION), _json(folder, TOKENIZER)
    files, tensors = component_weights(folder.parent, folder.name)
    return TextCheckpoint(folder, "safetensors", family, config, files, tensors, content, generation, tokenizer)


def _json(folder: Path, name: str) -> dict[str, Any]:
    """An optional file is an empty table."""
    if name != CONFIG and not (folder / name).exists():
        return {}
    content = read_json(folder.parent, f"{folder.name}/{name}")
    refuse_remote_code(f"{folder.name}/{name}", content)
    return content


def _gguf(path: Path) -> TextCheckpoint:
    header = read_gguf(path, path.name)
    keys = Keys(header.metadata, path.name)
    if keys.get("split.count", 1) > 1:
        raise CorruptModel(
            f"{path.name} is one of {keys.get('split.count', 1)} parts; join them with llama.cpp's "
            "`llama-gguf-split --merge`."
        )
    family = registry.by_architecture(keys.need("general.architecture", str), path.name)
    tensors = {}
    for name, info in header.tensors.items():
        known = canonical(name)
        if known is None:
            raise CorruptModel(f"{path.name}: the tensor {name[:80]!r} has no place in a model of {family.name}.")
        tensors[known] = info
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].shape) != 2:
        raise CorruptModel(f"{path.name} holds no embedding of tokens; is it a language model?")
    config = family.from_gguf(keys, tensors[EMBEDDING].shape[0], HEAD not in tensors)
    if FREQUENCIES in tensors:
        config = replace(config, rope=replace(config.rope, factors=True))
    return TextCheckpoint(path, "gguf", family, config, (path,), tensors, header.metadata, {}, {})


def weight_bytes(checkpoint: TextCheckpoint, itemsize: int) -> int:
    """Bytes of all weights, each number in `itemsize` bytes."""
    return sum(math.prod(info.shape) * itemsize for info in checkpoint.tensors.values())
