"""How users name the adapters of a language model: on the command line and in requests. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal_gen.adapters import NICKNAME, AdapterSource, SwapLoras, check_nickname
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import InvalidValue
from multimodal_gen.lora.sources import make_source

FLAG = "NAME=PATH, or NAME=PATH:pinned"
PINNED = ":pinned"
SEPARATOR = ":"


@dataclass(frozen=True)
class Flag:
    """One `--lora-paths`."""

    name: str
    path: str
    pinned: bool

    @property
    def source(self) -> AdapterSource:
        """Whoever starts the engine may read any file. Raises as `make_source`."""
        return make_source(self.name, self.path, None)


def parse_flags(config: EngineConfig) -> list[Flag]:
    """Raises: InvalidValue."""
    flags = [_parse(text) for text in config.lora_paths]
    names = [flag.name for flag in flags]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise InvalidValue(f"--lora-paths names {double!r} twice.", param="lora_paths")
    return flags


def _parse(text: str) -> Flag:
    name, equals, path = text.partition("=")
    pinned = path.endswith(PINNED)
    path = path.removesuffix(PINNED)
    if not equals or not path:
        raise InvalidValue(f"--lora-paths must be {FLAG}, got {text[:80]!a}.", param="lora_paths")
    return Flag(check_nickname(name, "lora_paths"), path, pinned)


def start_change(config: EngineConfig) -> SwapLoras | None:
    """What `--lora-paths` asks for at the start. Raises: InvalidValue, AdapterNotFound, UnsafeFormat."""
    flags = parse_flags(config)
    return SwapLoras(sources=tuple(flag.source for flag in flags)) if flags else None


def pinned_names(config: EngineConfig) -> frozenset[str]:
    """Raises: InvalidValue."""
    return frozenset(flag.name for flag in parse_flags(config) if flag.pinned)


def split_model(model: str, known: Iterable[str]) -> tuple[str, str | None]:
    """(model, adapter) of a request's `model`; the adapter of `base:adapter`, or None.

    `known` are the names of the served model, which may have a colon themselves.
    """
    if model in known:
        return model, None
    base, colon, adapter = model.rpartition(SEPARATOR)
    return (base, adapter) if colon and base in known else (model, None)


def read_name(value: Any, param: str = "lora_path") -> str:
    """A request's `lora_path`. Raises: InvalidValue."""
    if not isinstance(value, str) or not value:
        raise InvalidValue(
            f"{param!r} must be the name of a loaded adapter, or the path of one inside --lora-root.", param=param
        )
    return value


def is_name(text: str) -> bool:
    """Whether a `lora_path` can be the name of an adapter; everything else is a path."""
    return NICKNAME.fullmatch(text) is not None


def source_of(name: str, path: Any, roots: Sequence[Path] | None, alpha: float | None, partial: bool) -> AdapterSource:
    """Raises: InvalidValue; as `resolve_path`."""
    return make_source(name, read_name(path), roots, alpha, partial)
