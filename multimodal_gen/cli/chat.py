"""`mmgen chat`: talk with a language model in this terminal, or ask it one thing."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from multimodal_gen.cli.flags import Arguments, Parser, add_settings, number, read_settings, whole
from multimodal_gen.cli.text import as_json, harmless
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import AdapterNotFound, ConfigError, MmgenError, did_you_mean

if TYPE_CHECKING:
    from multimodal_gen.llm_api import LLM
    from multimodal_gen.messages import TextDelta
    from multimodal_gen.text import TextOutput

DEFAULT_LLM = "smollm2"
HELP = """/reset          forget the conversation
/system TEXT    begin anew with these instructions; without TEXT, with none
/adapter NAME   answer with an adapter of --lora-paths from now on; without NAME, with none
/help           show this
/exit           leave; so does Ctrl-D. Ctrl-C stops an answer."""
PROMPT = "> "


def add_arguments(parser: Parser) -> None:
    """Flags of `mmgen chat`."""
    parser.usage = "mmgen chat [PROMPT] [flags]"
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="ask this and leave; - reads it from stdin (default: a conversation)",
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions before the conversation")
    parser.add_argument(
        "--adapter", metavar="NAME", help="answer with this adapter of --lora-paths (default: the only one there is)"
    )
    parser.add_argument("--json", action="store_true", help="with PROMPT: print one JSON object instead of the text")
    group = parser.add_argument_group("sampling", "the model's defaults apply to what is left out")
    group.add_argument("--max-tokens", type=whole, metavar="N", help="tokens of an answer (default: what fits)")
    group.add_argument("--temperature", type=number, metavar="T", help="0 takes the most likely token")
    group.add_argument("--top-p", type=number, metavar="P", help="share of probability that is kept")
    group.add_argument("--top-k", type=whole, metavar="K", help="candidates kept; 0 = all")
    group.add_argument("--seed", type=whole, metavar="N", help="the same seed gives the same answers")
    add_settings(parser, EngineConfig)


def run(arguments: Arguments) -> int:
    """Talk; 0 at the end of the conversation, errors as for every command."""
    if arguments.json and arguments.prompt is None:
        raise ConfigError("--json needs a PROMPT: a conversation is shown as it goes.")
    config = read_settings(arguments, EngineConfig)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    prompt = _whole_input() if arguments.prompt == "-" else arguments.prompt
    # Whatever a library prints while it loads belongs on stderr: stdout holds the answers alone.
    with contextlib.redirect_stdout(sys.stderr):
        llm = _load(config)
    with llm:
        talk = Talk(llm, _sampling(arguments), arguments.system)
        talk.use(arguments.adapter or (next(iter(llm.lora_adapters)) if len(llm.lora_adapters) == 1 else None))
        if prompt is None:
            return _converse(talk)
        output = talk.ask(prompt, shown=not arguments.json)
        if arguments.json:
            print(as_json({"model": llm.card.name, "adapter": talk.adapter, **_facts(output)}))
    return 0


def _load(config: EngineConfig) -> LLM:
    from multimodal_gen.llm_api import LLM

    return LLM(msgspec.structs.replace(config, llm_path=config.llm_path or DEFAULT_LLM))


def _sampling(arguments: Arguments) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    values = {name: vars(arguments)[name] for name in names}
    return {name: value for name, value in values.items() if value is not None}


@dataclass
class Talk:
    """A conversation so far."""

    llm: LLM
    sampling: dict[str, Any]
    system: str | None
    adapter: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)  # without the system's

    def reset(self, system: str | None) -> None:
        """Begin anew."""
        self.system, self.messages = system, []

    def use(self, adapter: str | None) -> None:
        """Answer with an adapter, or none, from now on. Raises: AdapterNotFound."""
        known = self.llm.lora_adapters
        if adapter is not None and adapter not in known:
            raise AdapterNotFound(
                f"There is no adapter {adapter[:128]!a}.{did_you_mean(adapter[:128], known)} --lora-paths NAME=PATH "
                "loads one."
            )
        self.adapter = adapter

    def ask(self, text: str, *, shown: bool) -> TextOutput:
        """One question and its answer, which is shown as it is written.

        What was asked in vain (an error, Ctrl-C) is no part of the conversation.
        """
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        asked = {"role": "user", "content": text}
        show = _show if shown else None
        (output,) = self.llm.chat([*first, *self.messages, asked], lora=self.adapter, on_delta=show, **self.sampling)
        if shown:
            print(flush=True)
        self.messages += [asked, {"role": "assistant", "content": output.text}]
        return output


def _use(talk: Talk, adapter: str | None) -> None:
    try:
        talk.use(adapter)
    except MmgenError as error:
        print(error.message, file=sys.stderr)


def _show(delta: TextDelta) -> None:
    print(harmless(delta.text) if sys.stdout.isatty() else delta.text, end="", flush=True)


def _converse(talk: Talk) -> int:
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{talk.llm.card.name} on {talk.llm.info.device}. /help lists the commands.", file=sys.stderr)
    for line in _lines(terminal=terminal):
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return 0
        if command == "/help":
            print(HELP, file=sys.stderr)
        elif command == "/reset":
            talk.reset(talk.system)
        elif command == "/system":
            talk.reset(rest.strip() or None)
        elif command == "/adapter":
            _use(talk, rest.strip() or None)
        elif command.startswith("/") and command[1:].isalpha():
            print(f"There is no command {command}; /help lists them.", file=sys.stderr)
        elif line:
            _answer(talk, line, terminal=terminal)
    return 0


def _answer(talk: Talk, line: str, *, terminal: bool) -> None:
    """In a terminal, an error or Ctrl-C ends the answer and not the conversation."""
    try:
        talk.ask(line, shown=True)
    except KeyboardInterrupt:
        if not terminal:
            raise
        print(file=sys.stderr)
    except MmgenError as error:
        if not terminal:
            raise
        print(f"mmgen chat: {error.message} /reset begins anew.", file=sys.stderr)


def _lines(*, terminal: bool) -> Iterator[str]:
    """What is typed, line by line, until the end."""
    if not terminal:
        for line in sys.stdin:
            yield line.strip()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives `input` its history and editing
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            print(file=sys.stderr)
            return
        yield line.strip()


def _whole_input() -> str:
    text = sys.stdin.read().strip()
    if not text:
        raise ConfigError("PROMPT is -, and there is nothing on stdin.")
    return text


def _facts(output: TextOutput) -> dict[str, Any]:
    return {
        "text": output.text,
        "finish_reason": output.finish_reason,
        "usage": msgspec.to_builtins(output.usage),
    }
