"""The formats of tool calls by name, how to recognise a model's, and the grammars that force calls of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from multimodal_gen.errors import ConfigError, did_you_mean
from multimodal_gen.llm.parsers.tools.base import Tool, ToolParser
from multimodal_gen.llm.parsers.tools.glm import GlmCalls
from multimodal_gen.llm.parsers.tools.json_calls import HermesCalls, ListedCalls, LlamaCalls
from multimodal_gen.llm.parsers.tools.pythonic import PythonicCalls

MAX_SPACES = 4
"""in a row within forced JSON, where a small model may write nothing else for ever"""

Rule = dict[str, Any]
"""part of a structural tag, as xgrammar reads it"""


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls."""

    parser: type[ToolParser]
    signs: tuple[str, ...]  # all of them are in the chat template of a model that writes so
    tag: Callable[[Tool], Rule] | None = None  # what a call of this tool must look like; None: no grammar says it
    separator: str = "\n"  # between two calls
    trigger: str = ""  # what every call begins with and no other text has; "": there is nothing such
    around: tuple[str, str] = ("", "")  # all calls together


def _json_call(before: str, after: str) -> Callable[[Tool], Rule]:
    def tag(tool: Tool) -> Rule:
        return _tag(before % tool.name, tool, after)

    return tag


def _glm_call(tool: Tool) -> Rule:
    return _tag(f"<tool_call>{tool.name}", tool, "</tool_call>", style="glm_xml")


def _tag(begin: str, tool: Tool, end: str, **more: str) -> Rule:
    schema = tool.parameters
    if schema.get("properties") == {} and not schema.keys() & {"additionalProperties", "patternProperties"}:
        schema = {**schema, "additionalProperties": False}  # a function without parameters takes none
    content = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_SPACES, **more}
    return {"type": "tag", "begin": begin, "content": content, "end": end}


LISTED = ToolFormat(
    ListedCalls, (), _json_call('{"name": "%s", "arguments": ', "}"), separator=", ", around=("[", "]")
)  # fmt: skip
FORMATS: dict[str, ToolFormat] = {
    "glm47": ToolFormat(GlmCalls, ("<tool_call>", "<arg_key>"), _glm_call, trigger="<tool_call>"),
    "hermes": ToolFormat(
        HermesCalls,
        ("<tool_call>",),
        _json_call('<tool_call>\n{"name": "%s", "arguments": ', "}\n</tool_call>"),
        trigger="<tool_call>",
    ),
    "llama_json": ToolFormat(
        LlamaCalls, ('"parameters"',), _json_call('{"name": "%s", "parameters": ', "}"), separator="; "
    ),
    "pythonic": ToolFormat(PythonicCalls, ("[func_name1(",)),
}
ALIASES = {"qwen": "hermes", "llama3": "llama_json", "glm": "glm47"}


def tool_format(name: str, template: str | None) -> ToolFormat | None:
    """The format of that name; `auto` looks at the model's chat template, and takes Hermes' where that says nothing.

    None: tools are not offered. Raises: ConfigError.
    """
    if name == "none":
        return None
    if name == "auto":
        found = (row for row in FORMATS.values() if template and all(sign in template for sign in row.signs))
        return next(found, FORMATS["hermes"])
    name = ALIASES.get(name, name)
    if name not in FORMATS:
        known = [*FORMATS, *ALIASES]
        raise ConfigError(
            f"There is no tool call parser {name!a}.{did_you_mean(name, known)} There are: auto, none, "
            f"{', '.join(known)}.",
            param="tool_call_parser",
        )
    return FORMATS[name]


def forced(form: ToolFormat, tools: Sequence[Tool], *, parallel: bool) -> tuple[ToolFormat, Rule]:
    """What an answer must match that calls one of `tools`, or several, and says nothing else; and how it is written:
    in the model's own format where a grammar can say that, else as a list."""
    written = form if form.tag is not None else LISTED
    assert written.tag is not None
    calls: Rule = {
        "type": "tags_with_separator",
        "tags": [written.tag(tool) for tool in tools],
        "separator": written.separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }
    before, after = written.around
    return written, sequence(*filter(None, (_const(before), calls, _const(after))))


def offered(form: ToolFormat, tools: Sequence[Tool], *, parallel: bool) -> Rule | None:
    """What an answer must match whose calls are right wherever it makes some. None: no grammar can say that."""
    if form.tag is None or not form.trigger:
        return None
    return {
        "type": "triggered_tags",
        "triggers": [form.trigger],
        "tags": [form.tag(tool) for tool in tools],
        "at_least_one": False,
        "stop_after_first": not parallel,
    }


def sequence(*rules: Rule) -> Rule:
    """One after another."""
    return rules[0] if len(rules) == 1 else {"type": "sequence", "elements": list(rules)}


def _const(text: str) -> Rule | None:
    return {"type": "const_string", "value": text} if text else None
