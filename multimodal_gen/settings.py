"""How settings are settled: flags or keywords, the MMGEN_* variables, the --config file and the defaults.

A field `max_batch_tokens` of `config.py` is the flag `--max-batch-tokens`, the variable `MMGEN_MAX_BATCH_TOKENS`, the
YAML key and the keyword `max_batch_tokens`. Order of precedence: flag > variable > file > default. Nothing else reads
our variables.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from multimodal_gen.config import NO_MODEL, ServerConfig
from multimodal_gen.errors import ConfigError, did_you_mean

ENV_PREFIX = "MMGEN_"

Settings = TypeVar("Settings", bound=msgspec.Struct)


class Option(msgspec.Struct, frozen=True):
    """One settings field as a face of the program sees it."""

    name: str
    type: Any
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """The CLI flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.type is bool

    @property
    def is_list(self) -> bool:
        """Whether the flag may be repeated."""
        return get_origin(self.type) is list

    @property
    def choices(self) -> tuple[str, ...] | None:
        """Allowed words, where the type is a Literal."""
        return get_args(self.type) if get_origin(self.type) is Literal else None

    @property
    def is_secret(self) -> bool:
        """Whether the value must not be shown."""
        return self.name in ("api_key", "admin_api_key")


class Setting(msgspec.Struct, frozen=True):
    """One settled setting and where its value came from."""

    option: Option
    value: Any
    origin: str
    """`arguments`, the name of a variable, the path of the file, or `default`"""

    @property
    def shown(self) -> Any:
        """The value as it may be printed."""
        return "(hidden)" if self.option.is_secret and self.value is not None else self.value


def options(schema: type[msgspec.Struct]) -> list[Option]:
    """The fields of a settings class, in declaration order."""
    hints = get_type_hints(schema, include_extras=True)
    found = []
    for field in msgspec.structs.fields(schema):
        hint = hints[field.name]
        text = next(m.description for m in hint.__metadata__ if m.description)
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        found.append(Option(field.name, hint.__origin__, default, text))
    return found


def load(
    schema: type[Settings],
    given: Mapping[str, Any],
    *,
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Settle all settings of `schema` from keywords or flags, the environment, a YAML file and the defaults.

    A keyword that is None, an empty variable and an empty YAML value count as not given.
    Raises: ConfigError naming the option, where its value came from, and what is allowed.
    """
    return schema(**{s.option.name: s.value for s in settle(schema, given, file=file, environ=environ)})


def settle(
    schema: type[msgspec.Struct],
    given: Mapping[str, Any],
    *,
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[Setting]:
    """What `load` settles, with the origin of every value, in declaration order. Raises as `load`."""
    known = {option.name: option for option in options(schema)}
    settled = {name: Setting(option, option.default, "default") for name, option in known.items()}
    for found in (
        _from_file(file, known) if file else [],
        _from_environment(os.environ if environ is None else environ, known),
        _from_arguments(given, known),
    ):
        for name, value, origin in found:
            settled[name] = Setting(known[name], _convert(known[name], value, schema, origin), origin)
    _leave_out_pictures(settled)
    return list(settled.values())


def _leave_out_pictures(settled: dict[str, Setting]) -> None:
    """A language model alone was asked for: nobody named a model of pictures beside it."""
    if {"llm_path", "model_path"} <= set(settled):
        model, language = settled["model_path"], settled["llm_path"]
        if language.value is not None and model.origin == "default":
            settled["model_path"] = msgspec.structs.replace(model, value=NO_MODEL)


Found = Iterable[tuple[str, Any, str]]  # name, value, origin


def _from_arguments(given: Mapping[str, Any], known: Mapping[str, Option]) -> Found:
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"Unknown setting {name!r}." + did_you_mean(name, known), param=name)
        if value is not None:
            yield name, os.fspath(value) if isinstance(value, os.PathLike) else value, "arguments"


def _from_environment(environ: Mapping[str, str], known: Mapping[str, Option]) -> Found:
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable[len(ENV_PREFIX) :].lower()
        if name not in _all_names():
            raise ConfigError(
                f"Unknown environment variable {variable}."
                + did_you_mean(variable, [ENV_PREFIX + n.upper() for n in _all_names()]),
                param=name,
            )
        if name in known and value:
            yield name, value, variable


def _from_file(path: str | Path, known: Mapping[str, Option]) -> Found:
    for key, value in _read_file(path).items():
        name = str(key).replace("-", "_")
        # One file may serve `mmgen serve` and `mmgen generate`, which has no server settings.
        if name not in _all_names():
            raise ConfigError(f"Unknown setting {str(key)!r} in {path}." + did_you_mean(name, _all_names()), param=name)
        if name in known and value is not None:
            yield name, value, str(path)


def _all_names() -> list[str]:
    return [field.name for field in msgspec.structs.fields(ServerConfig)]


def _convert(option: Option, value: Any, schema: type[msgspec.Struct], origin: str) -> Any:
    hint = get_type_hints(schema, include_extras=True)[option.name]
    if option.is_list and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        converted = msgspec.convert(_parse(hint, value), hint, strict=False)
    except ValueError as error:  # msgspec's ValidationError is one
        raise _invalid(option, value, origin, str(error)) from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise _invalid(option, value, origin, "Expected a finite number")
    return converted


def _parse(hint: Any, value: Any) -> Any:
    """What the field's own reader makes of a value as it was written."""
    parse = next((meta.extra["parse"] for meta in hint.__metadata__ if meta.extra), None)
    return value if parse is None else parse(value)


def _invalid(option: Option, value: Any, origin: str, why: str) -> ConfigError:
    shown = "the given value" if option.is_secret else repr(value)[:80]
    source = "" if origin == "arguments" else f" (from {origin})"
    if option.choices:
        why = f"choose one of {', '.join(option.choices)}.{did_you_mean(str(value), option.choices)}"
    elif option.is_switch:
        why = "it is true or false."
    else:
        why = f"{why[0].lower()}{why[1:].replace('`', '')}. It is: {option.help}."
    return ConfigError(f"{option.flag} cannot be {shown}{source}: {why}", param=option.name)


def _read_file(path: str | Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"Cannot read the configuration file {path}: {reason}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"The configuration file {path} must hold a mapping of setting names to values.")
    return content
