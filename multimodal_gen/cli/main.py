"""`mmgen`: finds the subcommand and turns every failure into one line on stderr and an exit code.

Exit codes: 0 done; 1 it failed; 2 the caller can mend it (flags, names, files); 130 interrupted by Ctrl-C.
Only the chosen subcommand is imported, and heavy packages only once it needs them: `mmgen --help` must feel instant.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from multimodal_gen.cli.flags import Arguments, Parser
from multimodal_gen.errors import ConfigError, MmgenError, UserError, did_you_mean
from multimodal_gen.version import __version__


class Command(NamedTuple):
    """One row of the table of subcommands."""

    module: str
    summary: str


COMMANDS = {
    "generate": Command("multimodal_gen.cli.generate", "make images from a prompt, here and now"),
    "chat": Command("multimodal_gen.cli.chat", "talk with a language model, here and now"),
    "serve": Command("multimodal_gen.cli.serve", "run the HTTP server (OpenAI API)"),
    "lora": Command("multimodal_gen.cli.lora", "list adapter files, or look into one"),
    "models": Command("multimodal_gen.cli.models", "list the models that can run, or describe one"),
    "doctor": Command("multimodal_gen.cli.doctor", "report devices, dtypes, memory, and whether a model fits"),
    "bench": Command("multimodal_gen.cli.bench", "measure this machine: ours beside its peers (needs the repository)"),
    "config": Command("multimodal_gen.cli.config_show", "show every setting, its value and where that came from"),
}

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
TRACEBACK = "--traceback"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if TRACEBACK in arguments:
        arguments.remove(TRACEBACK)
        return _run(arguments)
    try:
        return _run(arguments)
    except UserError as error:
        return _report(error.message, USER_ERROR)
    except MmgenError as error:
        return _report(error.message, FAILED)
    except KeyboardInterrupt:
        return _report("interrupted.", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output left (`mmgen models | head`); Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _report(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", FAILED)
    except Exception as error:  # noqa: BLE001  the last line of defence: a user never sees a traceback
        kind = type(error).__name__
        return _report(f"internal error, please report it: {kind}: {error} (details: add {TRACEBACK}).", FAILED)


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
        return DONE
    if name == "--version":
        print(f"mmgen {__version__}")
        return DONE
    if name not in COMMANDS:
        kind = "flag" if name.startswith("-") else "command"
        raise ConfigError(
            f"Unknown {kind} {name!r}.{did_you_mean(name, COMMANDS)} Commands: {', '.join(COMMANDS)}; `mmgen --help`."
        )
    module = vars(importlib.import_module(COMMANDS[name].module))
    add_arguments: Callable[[Parser], None] = module["add_arguments"]
    run: Callable[[Arguments], int] = module["run"]
    parser = Parser(prog=f"mmgen {name}", description=COMMANDS[name].summary)
    add_arguments(parser)
    parsed = parser.read(arguments[1:])
    return DONE if parsed is None else run(parsed)


def _help() -> str:
    rows = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mmgen COMMAND [flags]",
            "",
            "Image generation from one command.",
            "",
            *rows,
            "",
            "`mmgen COMMAND --help` lists a command's flags. Every setting is also a variable MMGEN_NAME and a key of",
            "the YAML file given with --config; flags win over variables, variables over the file.",
            f"Everywhere: {TRACEBACK} shows the Python traceback of an error. `mmgen --version` shows the version.",
        ]
    )


def _report(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
