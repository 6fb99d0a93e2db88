"""`mmgen serve`: the HTTP server."""

from __future__ import annotations

from multimodal_gen.cli.flags import Arguments, Parser, add_settings, read_settings
from multimodal_gen.config import ServerConfig, check_bind


def add_arguments(parser: Parser) -> None:
    """Flags of `mmgen serve`."""
    parser.usage = "mmgen serve [flags]"
    add_settings(parser, ServerConfig)


def run(arguments: Arguments) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code is the server's."""
    config = read_settings(arguments, ServerConfig)
    check_bind(config)
    from multimodal_gen.server.run import serve

    return serve(config)
