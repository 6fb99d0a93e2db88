"""Which files adapters may come from, and the `NAME=PATH:STRENGTH:TARGET` of command lines. No torch here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal_gen.adapters import (
    MERGE_MODES,
    TARGETS,
    AdapterSource,
    AdapterUse,
    MergeMode,
    SetLora,
    Target,
    broadcast,
    check_alpha,
    check_nickname,
    check_strength,
    check_word,
)
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import AdapterMismatch, AdapterNotFound, InvalidValue, PathNotAllowed, UnsafeFormat

DEFAULT_ROOT = "loras"  # of a server, in the folder where it was started
MAX_PATH = 4096
FLAG = "NAME=PATH[:STRENGTH[:TARGET]][:alpha=ALPHA][:partial]"
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # peft's and diffusers' names
CONFIG = "adapter_config.json"  # peft's, beside the file
PICKLES = frozenset({".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth"})

_FOREIGN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|\\\\|~")


def server_roots(given: Sequence[str]) -> tuple[Path, ...]:
    """The folders that a server's clients may name adapters in."""
    return tuple(Path(root) for root in given or [DEFAULT_ROOT])


def resolve_path(text: str, roots: Sequence[Path] | None, param: str = "lora_path") -> Path:
    """The adapter file that a path means, of a folder the one inside.

    Args:
        roots: the file must lie inside one of them, links followed; relative paths are looked up in each. None: any
            path of this machine, as its own user may read.

    Raises: PathNotAllowed for paths outside, whether something is there or not; AdapterNotFound; as `locate`.
    """
    if not text or "\0" in text or len(text) > MAX_PATH:
        raise InvalidValue(f"{param!r} must be a path of 1 to {MAX_PATH} characters.", param=param)
    if roots is None:
        return _file(_home(text, param), text, param)
    if _FOREIGN.match(text):
        raise _outside(text, param)
    allowed = [Path(os.path.realpath(root)) for root in roots]
    candidates = [root / text for root in allowed]  # an absolute text replaces the root
    inside = [path for path in candidates if _is_inside(path, allowed)]
    found = next((path for path in inside if os.path.lexists(path)), None)
    if found is None and len(inside) < len(candidates):
        raise _outside(text, param)
    file = _file(found or inside[0], text, param)
    if not _is_inside(file, allowed):  # a link inside a folder
        raise _outside(text, param)
    return file


def locate(path: Path) -> Path:
    """The safetensors file that a path means: itself, or the one inside a folder.

    Raises: AdapterNotFound, UnsafeFormat, AdapterMismatch where a folder leaves it open.
    """
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:5])
            raise AdapterMismatch(f"{path.name}/ holds {len(found)} adapters ({names}); name one of the files.")
        pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]
        if pickles:
            raise unsafe(pickles[0])
        raise AdapterNotFound(f"The folder {path.name}/ holds no safetensors file.")
    if path.suffix.lower() in PICKLES:
        raise unsafe(path.name)
    if not path.is_file():
        raise AdapterNotFound(f"There is no adapter file {path.name!r} at that path.")
    return path


def unsafe(name: str) -> UnsafeFormat:
    """The error for a pickle."""
    return UnsafeFormat(
        f"{name} is a pickle, which can run code when it is read, and is never opened. Convert it to safetensors where "
        "you trust it."
    )


def make_source(
    nickname: str, text: str, roots: Sequence[Path] | None, alpha: float | None = None, allow_partial: bool = False
) -> AdapterSource:
    """The source that a checked nickname and a user's path mean. Raises as `resolve_path`."""
    path = resolve_path(text, roots)
    return AdapterSource(nickname=nickname, path=str(path), alpha=alpha, allow_partial=allow_partial)


def set_change(
    nickname: Any,
    path: Any = None,
    target: Any = "all",
    strength: Any = 1.0,
    merge_mode: Any = None,
    *,
    alpha: Any = None,
    allow_partial: bool = False,
    roots: Sequence[Path] | None,
    default_mode: MergeMode,
) -> SetLora:
    """The change that a set_lora call means: scalars or lists, `path` None where the adapter is loaded already.

    Raises: InvalidValue naming the field; as `resolve_path`.
    """
    uses, files = broadcast(nickname, path, target, strength, alpha)
    sources = [make_source(name, text, roots, own, allow_partial) for name, (text, own) in files.items()]
    mode = default_mode if merge_mode is None else check_word(merge_mode, MERGE_MODES, "merge_mode")
    return SetLora(sources=tuple(sources), uses=uses, mode=mode)


@dataclass(frozen=True)
class Flag:
    """One `--lora`; filled by `parse_flag`."""

    use: AdapterUse
    path: str
    alpha: float | None
    allow_partial: bool

    @property
    def source(self) -> AdapterSource:
        """Whoever starts the engine may read any file: the roots bind clients only. Raises as `make_source`."""
        return make_source(self.use.nickname, self.path, None, self.alpha, self.allow_partial)


def start_change(config: EngineConfig) -> SetLora | None:
    """What `--lora` asks for at the start. Raises: InvalidValue, AdapterNotFound, UnsafeFormat."""
    flags = [parse_flag(text) for text in config.lora]
    sources = {flag.use.nickname: flag.source for flag in flags}
    for flag in flags:
        if flag.source != sources[flag.use.nickname]:
            raise InvalidValue(f"--lora names {flag.use.nickname!r} twice with different files.", param="lora")
    if not flags:
        return None
    return SetLora(sources=tuple(sources.values()), uses=tuple(flag.use for flag in flags), mode=config.lora_merge_mode)


def parse_flag(text: str) -> Flag:
    """`NAME=PATH[:STRENGTH[:TARGET]][:alpha=ALPHA][:partial]`. Raises: InvalidValue."""
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise InvalidValue(f"--lora must be {FLAG}, got {text[:80]!a}.", param="lora")
    rest, partial = (rest.removesuffix(":partial"), True) if rest.endswith(":partial") else (rest, False)
    alpha = None
    head, mark, last = rest.rpartition(":alpha=")
    if mark:
        if not _is_number(last):
            raise InvalidValue(f"--lora {text[:80]!a}: {last[:40]!a} is no alpha.", param="lora")
        rest, alpha = head, check_alpha(float(last), "lora")
    use, path = _use_and_path(text, name, rest)
    return Flag(use, path, alpha, partial)


def _use_and_path(text: str, name: str, rest: str) -> tuple[AdapterUse, str]:
    path, strength, target = rest, 1.0, TARGETS[0]
    head, colon, last = path.rpartition(":")
    if colon and last in TARGETS:
        path, target = head, check_word(last, TARGETS, "lora")
    head, colon, last = path.rpartition(":")
    if colon and _is_number(last):
        path, strength = head, check_strength(float(last), "lora")
    elif colon and "/" not in last and "." not in last:
        raise InvalidValue(
            f"--lora {text[:80]!a}: {last[:40]!a} is no strength; write {FLAG} with a target of {', '.join(TARGETS)}.",
            param="lora",
        )
    return AdapterUse(nickname=check_nickname(name, "lora"), strength=strength, target=_target(target)), path


def _target(word: str) -> Target:
    return check_word(word, TARGETS, "lora")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _home(text: str, param: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        raise AdapterNotFound(f"There is no adapter at {text[:200]!a}.", param=param) from None


def _is_inside(path: Path, roots: Sequence[Path]) -> bool:
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(root) for root in roots)


def _file(path: Path, text: str, param: str) -> Path:
    """Links of folders are followed; that of the file itself is kept: its neighbours belong to the adapter."""
    try:
        path.resolve(strict=True)
        file = locate(path)
    except (OSError, RuntimeError):  # missing, too long, a loop of links, no permission to look
        raise AdapterNotFound(f"There is no adapter at {text[:200]!a}.", param=param) from None
    return file.parent.resolve() / file.name


def _outside(text: str, param: str) -> PathNotAllowed:
    return PathNotAllowed(
        f"{text[:200]!a} is not inside a folder that adapters may be loaded from (--lora-root); put the file there, or "
        "upload it with POST /v1/loras.",
        param=param,
    )
