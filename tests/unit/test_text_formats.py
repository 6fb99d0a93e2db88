"""Rules for answers: what a request asks for, around what the model's own formats need."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from multimodal_gen.config import ServerConfig
from multimodal_gen.errors import ConfigError, UnsupportedParameter
from multimodal_gen.llm.parsers.pieces import CallArguments, CallStart, Text
from multimodal_gen.llm.parsers.reasoning import FORMATS as REASONING
from multimodal_gen.llm.parsers.tools.registry import FORMATS, LISTED
from multimodal_gen.server.text_formats import Forms, Rule, shape
from multimodal_gen.server.tool_wishes import read_tools

pytestmark = [pytest.mark.unit]

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "get"}},
]
STRICT = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
# How each format writes two calls.
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>',
    "llama_json": '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "get", "parameters": {}}',
    "glm47": "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>\n"
    "<tool_call>get</tool_call>",
    "pythonic": '[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get", "arguments": {}}]',
}


@cache
def _grammar(source: str) -> Any:
    import xgrammar

    return xgrammar.Grammar.from_structural_tag(json.loads(source))


def accepts(rule: Rule | None, text: str) -> bool:
    """Whether the grammar library takes the whole text."""
    from xgrammar.testing import _is_grammar_accept_string

    assert rule is not None
    assert rule.kind == "structural_tag"
    return bool(_is_grammar_accept_string(_grammar(rule.source), text))


@pytest.mark.parametrize("name", FORMATS)
def test_required_calls_are_what_the_format_reads(name: str) -> None:
    made = shape(None, read_tools(TOOLS, "required", None), FORMATS[name], None, inside=False)
    assert made.tools is not None
    text = WRITTEN[name]
    assert accepts(made.rule, text)
    for wrong in ("", "Hello", "Well: " + text, text + " Done.", text.replace("get_weather", "other")):
        assert not accepts(made.rule, wrong), wrong
    parser = made.tools.parser(read_tools(TOOLS, None, None).allowed)
    pieces = parser.feed(text) + parser.finish()
    assert [piece.name for piece in pieces if isinstance(piece, CallStart)] == ["get_weather", "get"]
    assert not [piece for piece in pieces if isinstance(piece, Text)]
    told = "".join(piece.text for piece in pieces if isinstance(piece, CallArguments))
    assert told == '{"city": "Paris"}{}'


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_alone_where_no_more_are_wanted(name: str) -> None:
    single = shape(None, read_tools(TOOLS, "required", False), FORMATS[name], None, inside=False)
    assert not accepts(single.rule, WRITTEN[name])
    named = shape(
        None,
        read_tools(TOOLS, {"type": "function", "function": {"name": "get"}}, None),
        FORMATS[name],
        None,
        inside=False,
    )
    first, second = _calls(name)
    assert accepts(named.rule, second)
    assert not accepts(named.rule, first)


@pytest.mark.parametrize("name", FORMATS)
def test_a_function_without_parameters_gets_none(name: str) -> None:
    made = shape(None, read_tools(TOOLS[1:], "required", False), FORMATS[name], None, inside=False)
    _, call = _calls(name)
    assert accepts(made.rule, call)
    assert not accepts(
        made.rule, call.replace("{}", '{"a": 1}').replace("</", "<arg_key>a</arg_key><arg_value>1</arg_value></")
    )


def _calls(name: str) -> tuple[str, str]:
    text = WRITTEN[name]
    separator = (FORMATS[name] if FORMATS[name].tag else LISTED).separator
    if name == "pythonic":
        first, second = text[1:-1].split("}, ")
        return f"[{first}}}]", f"[{second}]"
    at = text.index(separator + (text[:10] if name == "hermes" else text[:2]))
    return text[:at], text[at + len(separator) :]


@pytest.mark.parametrize("name", FORMATS)
def test_strict_tools_leave_text_free_and_calls_right(name: str) -> None:
    made = shape(None, read_tools(STRICT, None, None), FORMATS[name], None, inside=False)
    assert accepts(made.rule, "Hello there.\nHow are you?")
    assert accepts(made.rule, WRITTEN[name])
    wrong = WRITTEN[name].replace('"Paris"', "3").replace(">Paris<", "><").replace("city", "town")
    assert not accepts(made.rule, wrong)


def test_a_model_may_think_before_it_obeys() -> None:
    schema = Rule("json_schema", json.dumps({"type": "integer"}), "response_format")
    started = shape(schema, read_tools(None, None, None), None, REASONING["qwen3"], inside=True)
    assert started.rule is not None
    assert started.rule.param == "response_format"
    assert accepts(started.rule, "Hm, let me see.\n</think>\n\n7")
    assert not accepts(started.rule, "7")
    free = shape(schema, read_tools(None, None, None), None, REASONING["qwen3"], inside=False)
    assert accepts(free.rule, "7")
    assert accepts(free.rule, "<think>\nHm.\n</think>\n\n7")
    assert not accepts(free.rule, "Hm. 7")
    calls = shape(None, read_tools(TOOLS, "required", None), FORMATS["hermes"], REASONING["qwen3"], inside=True)
    assert accepts(calls.rule, "Which <tool_call>?</think>\n" + WRITTEN["hermes"])


def test_with_a_format_beside_tools_an_answer_is_either() -> None:
    schema = Rule("json_schema", json.dumps({"type": "integer"}), "response_format")
    either = shape(schema, read_tools(TOOLS, "auto", None), FORMATS["hermes"], None, inside=False)
    assert accepts(either.rule, "7")
    assert accepts(either.rule, WRITTEN["hermes"])
    assert not accepts(either.rule, "7" + WRITTEN["hermes"])


def test_nothing_is_forced_where_nothing_has_to_be() -> None:
    assert shape(None, read_tools(TOOLS, None, None), FORMATS["hermes"], REASONING["qwen3"], inside=True).rule is None
    regex = Rule("regex", "a+", "regex")
    assert shape(regex, read_tools(None, None, None), FORMATS["hermes"], None, inside=False).rule == regex


def test_tools_need_a_parser() -> None:
    with pytest.raises(UnsupportedParameter, match="--tool-call-parser none"):
        shape(None, read_tools(TOOLS, None, None), None, None, inside=False)
    with pytest.raises(ConfigError, match="no tool call parser 'x'"):
        Forms.of(ServerConfig(tool_call_parser="x"), None)
