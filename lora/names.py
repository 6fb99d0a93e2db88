"""Which names of adapter files mean which weights of a model. No torch here.

A family's `spec.py` says what can be adapted (`AdapterTarget`) and how other programs spell its modules (`Alias`). The
canonical spelling is that of the checkpoint's own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    modules: tuple[str, ...]  # patterns of canonical module paths that adapters are trained on; for naming a family
    aliases: tuple[Alias, ...] = ()
    strip: str = ""  # pattern of a prefix of the checkpoint's names that no adapter file spells


@dataclass(frozen=True)
class TreeLayout:
    """What an adapter is bound against: the parameters of one tree under their canonical names."""

    target: AdapterTarget
    shapes: Mapping[str, tuple[int, ...]]  # "layers.0.attention.to_q.weight" → (out, in)
    inert: frozenset[str] = field(default=frozenset())  # in the checkpoint, but nothing reads their result

    def modules(self) -> dict[str, tuple[str, ...]]:
        """Every known spelling → the canonical modules it means, in row order."""
        canonical = {name.rpartition(".")[0] or name for name in (*self.shapes, *self.inert)}
        names: dict[str, tuple[str, ...]] = {module: (module,) for module in canonical}
        for alias in self.target.aliases:
            for module in canonical:
                match = re.fullmatch(alias.pattern, module)
                if match:
                    parts = tuple(match.expand(part) for part in alias.parts) or (module,)
                    names.setdefault(match.expand(alias.name), parts)
        return names
