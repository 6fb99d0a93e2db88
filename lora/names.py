"""Which names of adapter files mean which weights of a model. No torch here.

A family's `spec.py` says what can be adapted (`AdapterTarget`) and how other programs spell its modules (`Alias`). The
canonical spelling is that of the checkpoint's own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Alias:
    """Another program's name for one module, or for several that it stores fused along the output rows.

    `pattern` matches a canonical module path; `name` and `parts` are templates of that match, as in `re.Match.expand`.
    Without `parts` the alias names the matched module alone; else `parts` lists the canonical modules in row order, and
    `pattern` matches the first of them.
    """

    pattern: str
    name: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterTarget:
    """One module tree of a family that adapters can change."""

    tree: str  # "transformer", "transformer_2", "text_encoder"
    folder: str  # the component's folder in the checkpoint
    modules: tuple[str, ...]  # canonical paths that adapters are trained on, of the first block each; to name a family
    aliases: tuple[Alias, ...] = ()
    twin_of: str = ""  # another tree: files made for it mean this one as well
    strip: str = ""  # pattern of a prefix of the checkpoint's names that no adapter file spells


@dataclass(frozen=True)
class TreeLayout:
    """What an adapter is bound against: the parameters of one tree under their canonical names."""

    target: AdapterTarget
    shapes: Mapping[str, tuple[int, ...]]  # "layers.0.attention.to_q.weight" → (out, in)
    inert: frozenset[str] = field(default=frozenset())  # in the checkpoint, but nothing reads their result

    def modules(self) -> dict[str, tuple[str, ...]]:
        """Every known spelling → the canonical modules it means, in row order."""
        return spellings(self.target, {name.rpartition(".")[0] or name for name in (*self.shapes, *self.inert)})


def spellings(target: AdapterTarget, canonical: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every known spelling of these canonical modules → the modules it means, in row order."""
    names: dict[str, tuple[str, ...]] = {module: (module,) for module in canonical}
    for alias in target.aliases:
        for module in list(names):
            match = re.fullmatch(alias.pattern, module) if names[module] == (module,) else None
            if match:
                parts = tuple(match.expand(part) for part in alias.parts) or (module,)
                names.setdefault(match.expand(alias.name), parts)
    return names


def fits(target: AdapterTarget, modules: Iterable[tuple[str, bool]]) -> int:
    """How many modules of an adapter file a family knows: pairs of the path in the file's spelling, and whether that
    has "_" for every "."."""
    known = {_first_block(name) for name in spellings(target, target.modules)}
    flat = {name.replace(".", "_") for name in known}
    return sum(_first_block(name) in (flat if is_flat else known) for name, is_flat in modules)


def _first_block(module: str) -> str:
    """The same module of block 0."""
    return re.sub(r"(?<=[._])\d+(?=[._])", "0", module, count=1)
