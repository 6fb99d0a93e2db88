"""Command lines: flags derived from the settings schema, errors as `ConfigError`, and a did-you-mean for every name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec

from multimodal_gen.errors import ConfigError, did_you_mean
from multimodal_gen.settings import Option, Settings, load, options

Arguments = argparse.Namespace

# Keeps the flags of settings apart from a command's own, whatever their names.
_PREFIX = "setting_"
_HIDDEN = frozenset({"fault"})


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError and never abbreviates a flag."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises: ConfigError, always."""
        raise ConfigError(f"{message.removeprefix('argument ').rstrip('.')}. See `{self.prog} --help`.")

    def read(self, arguments: Sequence[str]) -> Arguments | None:
        """The parsed arguments; None when help was asked for and printed. Raises: ConfigError."""
        try:
            parsed, unknown = self.parse_known_args(arguments)
        except SystemExit:  # argparse leaves this way after printing help
            return None
        if unknown:
            raise ConfigError(self._unknown(unknown))
        return parsed

    def _unknown(self, unknown: list[str]) -> str:
        flag = next((part.split("=")[0] for part in unknown if part.startswith("-")), None)
        if flag is None:
            return f"Unexpected argument {unknown[0]!r}; put text with spaces in quotes. See `{self.prog} --help`."
        known = [name for action in self._actions for name in action.option_strings]
        return f"`{self.prog}` has no flag {flag}.{did_you_mean(flag, known)} See `{self.prog} --help`."


def add_settings(parser: Parser, schema: type[msgspec.Struct]) -> None:
    """Give `parser` one flag for each field of `schema`, and `--config`."""
    group = parser.add_argument_group("settings", "each is also a variable MMGEN_NAME and a key of the --config file")
    group.add_argument("--config", metavar="FILE", help="YAML file with settings")
    for option in options(schema):
        _add(group, option)


def given_settings(arguments: Arguments) -> dict[str, Any]:
    """The settings that were given as flags."""
    found = {name.removeprefix(_PREFIX): v for name, v in vars(arguments).items() if name.startswith(_PREFIX)}
    return {name: value for name, value in found.items() if value is not None}


def read_settings(arguments: Arguments, schema: type[Settings]) -> Settings:
    """Settle flags, environment, file and defaults. Raises: ConfigError."""
    return load(schema, given_settings(arguments), file=arguments.config)


def whole(text: str) -> int:
    """An argparse type: a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text[:40]!r}") from None


def number(text: str) -> float:
    """An argparse type: a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text[:40]!r}") from None


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    dest = _PREFIX + option.name
    text = argparse.SUPPRESS if option.name in _HIDDEN else _help(option)
    if option.is_switch:
        group.add_argument(option.flag, dest=dest, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif option.is_list:
        group.add_argument(option.flag, dest=dest, action="append", metavar="VALUE", help=text + "; repeatable")
    else:
        shape = "{" + ",".join(option.choices) + "}" if option.choices else "VALUE"
        group.add_argument(option.flag, dest=dest, metavar=shape, help=text)


def _help(option: Option) -> str:
    shown = "" if option.default in (None, []) else f" (default: {option.default})"
    return (option.help + shown).replace("%", "%%")
