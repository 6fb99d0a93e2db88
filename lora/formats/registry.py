"""From the tensors of a file to updates: one table of kinds, one of names (`names.py`).

A kind is a module of this folder with `NAME`, `ENDINGS` (of keys → role of the tensor), `REFUSED` (endings → what it
is) and `make` (the tensors of one module → its updates). A file may mix kinds; a key without a meaning is never dropped
in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor

from multimodal_gen.errors import CorruptAdapter
from multimodal_gen.lora.adapter import Entry, Parsed
from multimodal_gen.lora.file import AdapterFile
from multimodal_gen.lora.formats import diff, loha, lokr, lora
from multimodal_gen.lora.formats.names import name_of
from multimodal_gen.lora.formats.parts import Parts
from multimodal_gen.lora.formats.settings import Settings, read_settings
from multimodal_gen.lora.updates import Update


class Kind(NamedTuple):
    """One row of the table."""

    endings: Mapping[str, str]
    refused: Mapping[str, str]
    make: Callable[[Parts], list[tuple[str, Update]]]


KINDS = {kind.NAME: Kind(kind.ENDINGS, kind.REFUSED, kind.make) for kind in (lora, loha, lokr, diff)}
ALPHA = ".alpha"

_ENDINGS = [
    (re.compile(rf"(.+?){end}"), name, role) for name, kind in KINDS.items() for end, role in kind.endings.items()
]
_REFUSED = [(re.compile(rf".+?{end}"), what) for kind in KINDS.values() for end, what in kind.refused.items()]


def parse(file: AdapterFile, alpha: float | None = None) -> Parsed:
    """All updates of a file; `alpha` replaces that of every module.

    Raises: CorruptAdapter, AdapterError.
    """
    modules: dict[tuple[str, str], dict[str, Tensor]] = {}  # (module, kind) → role → tensor
    alphas: dict[str, Tensor] = {}
    strange: dict[str, str] = {}
    for key, tensor in file.tensors.items():
        if key.endswith(ALPHA):
            alphas[key.removesuffix(ALPHA)] = tensor
            continue
        found = _read_key(key)
        if found is None:
            strange[key] = _why_strange(key)
            continue
        module, kind, role = found
        roles = modules.setdefault((module, kind), {})
        if role in roles:
            raise CorruptAdapter(f"{file.name}: module {module!r} has two tensors for one role ({key!r}).")
        roles[role] = tensor
    settings = read_settings(file.name, file.metadata, file.config, bool(alphas), alpha)
    for module in alphas.keys() - {module for module, _ in modules}:
        strange[module + ALPHA] = "an alpha without factors"
    entries = [
        entry
        for (module, kind), roles in modules.items()
        for entry in _entries(module, kind, roles, alphas.get(module), settings)
    ]
    programs = dict.fromkeys(name_of(module)[0].program for module, _ in modules)
    kinds = dict.fromkeys(_kind_label(kind, roles) for (_, kind), roles in modules.items())
    return Parsed(entries, f"{', '.join(programs)}: {', '.join(kinds)}", strange)


def _read_key(key: str) -> tuple[str, str, str] | None:
    """(module, kind, role), or None."""
    for pattern, kind, role in _ENDINGS:
        match = pattern.fullmatch(key)
        if match:
            return match[1], kind, role
    return None


def _why_strange(key: str) -> str:
    return next((what for pattern, what in _REFUSED if pattern.fullmatch(key)), "not a known kind of adapter tensor")


def _kind_label(kind: str, roles: Mapping[str, Tensor]) -> str:
    return "dora" if "magnitude" in roles else kind


def _entries(
    module: str, kind: str, roles: Mapping[str, Tensor], alpha: Tensor | None, settings: Settings
) -> list[Entry]:
    naming, path = name_of(module)
    if alpha is not None and alpha.numel() != 1:
        raise CorruptAdapter(f"{settings.name}: alpha of {module!r} has {alpha.numel()} numbers.")
    own = None if alpha is None else float(alpha)
    parts = Parts(module, roles, partial(_scale, settings, naming.tree, path, own))
    return [Entry(naming.tree, path, naming.flat, name, update, module) for name, update in KINDS[kind].make(parts)]


def _scale(settings: Settings, tree: str | None, path: str, own: float | None, rank: int) -> float:
    return settings.scale(tree, path, rank, own)
