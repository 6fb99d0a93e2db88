"""What a diffusers pipeline class accepts, read from its source text: diffusers is not imported, nothing runs."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path

Default = int | float | str | bool | None


@dataclass(frozen=True)
class CallSignature:
    """The arguments of a pipeline's `__call__`."""

    required: tuple[str, ...]  # arguments without a default
    defaults: dict[str, Default]  # the others; a default that is no plain value reads None

    def __contains__(self, name: object) -> bool:
        return name in self.defaults or name in self.required

    def number(self, name: str, otherwise: float) -> float:
        """The default of `name` where it is a number."""
        value = self.defaults.get(name)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else otherwise


def read(class_name: str) -> CallSignature | None:
    """The signature of a pipeline class of the installed diffusers, or None when it has no such class."""
    source = _find(class_name)
    if source is None:
        return None
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == class_name)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__call__":
            return _signature(item.args)
    inherited = (read(base.id) for base in node.bases if isinstance(base, ast.Name) and base.id.endswith("Pipeline"))
    return next((found for found in inherited if found is not None), None)


def _find(class_name: str) -> bytes | None:
    spec = importlib.util.find_spec("diffusers")  # finds, does not import
    mark = f"\nclass {class_name}(".encode()
    for root in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted((Path(root) / "pipelines").rglob("*.py")):
            source = file.read_bytes()
            if mark in source:
                return source
    return None


def _signature(arguments: ast.arguments) -> CallSignature:
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]][1:]  # without self
    first = len(names) - len(arguments.defaults)
    defaults = dict(zip(names[first:], map(_plain, arguments.defaults), strict=True))
    required = names[:first]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is None:
            required.append(argument.arg)
        else:
            defaults[argument.arg] = _plain(default)
    return CallSignature(tuple(required), defaults)


def _plain(node: ast.expr) -> Default:
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, (int, float, str)) else None
