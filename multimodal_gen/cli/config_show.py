"""`mmgen config show`: every setting, its value and where the value came from."""

from __future__ import annotations

from multimodal_gen.cli.flags import Arguments, Parser, add_settings, given_settings
from multimodal_gen.cli.text import as_json, columns
from multimodal_gen.config import ServerConfig
from multimodal_gen.errors import ConfigError, did_you_mean
from multimodal_gen.settings import settle


def add_arguments(parser: Parser) -> None:
    """Flags of `mmgen config`."""
    parser.usage = "mmgen config [show] [flags]"
    parser.add_argument("action", nargs="?", default="show", metavar="show", help="the only action, and the default")
    parser.add_argument("--json", action="store_true", help="print one JSON object: name -> value and origin")
    add_settings(parser, ServerConfig)


def run(arguments: Arguments) -> int:
    """Print all settings as `mmgen serve` would use them with these flags, this environment and this file."""
    if arguments.action != "show":
        raise ConfigError(f"Unknown action {arguments.action!r}.{did_you_mean(arguments.action, ['show'])} Use `show`.")
    settings = settle(ServerConfig, given_settings(arguments), file=arguments.config)
    if arguments.json:
        print(as_json({s.option.name: {"value": s.shown, "origin": s.origin} for s in settings}))
    else:
        print(columns([(s.option.name, "" if s.value is None else str(s.shown), s.origin) for s in settings]))
    return 0
