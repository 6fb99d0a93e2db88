"""Reasoning and tool calls out of a model's text: whole, letter by letter, and cut anywhere."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from multimodal_gen.errors import ConfigError
from multimodal_gen.llm.parsers.answer import AnswerParser
from multimodal_gen.llm.parsers.pieces import CallArguments, CallStart, Piece, Reasoning, Text
from multimodal_gen.llm.parsers.reasoning import FORMATS as REASONING
from multimodal_gen.llm.parsers.reasoning import ReasoningParser, reasoning_format
from multimodal_gen.llm.parsers.tools.base import Tool, ToolParser
from multimodal_gen.llm.parsers.tools.glm import GlmCalls
from multimodal_gen.llm.parsers.tools.json_calls import HermesCalls, ListedCalls, LlamaCalls
from multimodal_gen.llm.parsers.tools.pythonic import PythonicCalls
from multimodal_gen.llm.parsers.tools.registry import FORMATS, tool_format

pytestmark = [pytest.mark.unit]

WEATHER = Tool(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "metric": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            "where": {"$ref": "#/$defs/place"},
        },
        "$defs": {"place": {"properties": {"lat": {"type": "number"}}}},
    },
)
TOOLS = [WEATHER, Tool("now")]

Whole = tuple[str, str, list[tuple[str, str]]]


def whole(pieces: list[Piece]) -> Whole:
    """(reasoning, text, calls with their arguments); the order of pieces is checked on the way."""
    reasoning, text, calls = "", "", list[tuple[str, str]]()
    for piece in pieces:
        if isinstance(piece, Reasoning):
            assert not calls
            reasoning += piece.text
        elif isinstance(piece, Text):
            assert piece.text
            text += piece.text
        elif isinstance(piece, CallStart):
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        else:
            assert isinstance(piece, CallArguments)
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return reasoning, text, calls


def read(text: str, make: Any) -> Whole:
    """What `text` comes to: the same at once, letter by letter, and in any two or three parts."""
    parser = make()
    found = whole(parser.feed(text) + parser.finish())
    chance = random.Random(text)
    cuts = [[text[:at], text[at:]] for at in range(len(text) + 1)] + [list(text)]
    for _ in range(20):
        first, second = sorted(chance.choices(range(len(text) + 1), k=2))
        cuts.append([text[:first], text[first:second], text[second:]])
    for parts in cuts:
        parser = make()
        pieces = [piece for part in parts for piece in parser.feed(part)] + parser.finish()
        assert whole(pieces) == found, parts
    return found


def calls_in(kind: type[ToolParser], text: str) -> tuple[str, list[tuple[str, Any]]]:
    """(text, calls with decoded arguments)."""
    _, rest, calls = read(text, lambda: kind(TOOLS))
    return rest, [(name, json.loads(arguments)) for name, arguments in calls]


# --- tool calls -----------------------------------------------------------------------------------------------------

PARIS = ("get_weather", {"city": "Paris"})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (HermesCalls, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'),
        (HermesCalls, '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_call>\n'),
        (HermesCalls, '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>'),
        (HermesCalls, '<tool_call>{"name":"get_weather","arguments":"{\\"city\\": \\"Paris\\"}"}</tool_call>'),
        (HermesCalls, '<tool_call>{"id": 3, "name": "get_weather", "arguments": {"city": "Paris"}}'),
        (LlamaCalls, '{"name": "get_weather", "parameters": {"city": "Paris"}}'),
        (LlamaCalls, '\n <|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}'),
        (ListedCalls, '[{"name": "get_weather", "arguments": {"city": "Paris"}}]'),
        (PythonicCalls, '[get_weather(city="Paris")]'),
        (PythonicCalls, "<|python_start|> [ get_weather ( city='Paris' , ) ] <|python_end|>"),
        (PythonicCalls, "[get_weather('Paris')]"),
        (GlmCalls, "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"),
        (
            GlmCalls,
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>\n",
        ),
    ],
)
def test_a_call_is_found(kind: type[ToolParser], text: str) -> None:
    assert calls_in(kind, text) == ("", [PARIS])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            HermesCalls,
            'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        ),
        (
            LlamaCalls,
            'Let me see. <|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now"}',
        ),
        (
            GlmCalls,
            "Let me see. \n<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>\n"
            "<tool_call>now</tool_call>",
        ),
    ],
)
def test_several_calls_after_text(kind: type[ToolParser], text: str) -> None:
    assert calls_in(kind, text) == ("Let me see.", [PARIS, ("now", {})])


def test_several_pythonic_calls_and_text_after_them() -> None:
    text = '[get_weather(city="a) ]\\"", days=-3, where={"lat": 1.5, "x": [true, None]}), now()] Done.'
    where = {"lat": 1.5, "x": [True, None]}
    first = ("get_weather", {"city": 'a) ]"', "days": -3, "where": where})
    assert calls_in(PythonicCalls, text) == ("Done.", [first, ("now", {})])


def test_marks_inside_of_arguments_are_text() -> None:
    city = "</tool_call>{[\"'\\n}"
    text = f'<tool_call>{{"name": "get_weather", "arguments": {{"city": {json.dumps(city)}}}}}</tool_call>'
    assert calls_in(HermesCalls, text) == ("", [("get_weather", {"city": city})])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (HermesCalls, "Hello  world.\n"),
        (HermesCalls, "a < b <tool_cal"),
        (HermesCalls, '<tool_call>{"name": "unknown", "arguments": {"x": 1}}</tool_call> and so on'),
        (HermesCalls, '<tool_call>\n{"arguments": {"x": 1}}\n</tool_call>'),
        (HermesCalls, "<tool_call>\n{name: get_weather}\n</tool_call>"),
        (HermesCalls, "<tool_call>get_weather()</tool_call>"),
        (HermesCalls, '<tool_call>{"name": "get_wea'),
        (HermesCalls, "<tool_call>"),
        (LlamaCalls, '{"answer": {"name": "get_weather"}}'),
        (LlamaCalls, '{"name": "unknown"}'),
        (LlamaCalls, '{"name": 3}'),
        (LlamaCalls, 'I say {"name": "get_weather"}'),
        (LlamaCalls, "{}"),
        (LlamaCalls, "{{{"),
        (ListedCalls, "[1, 2]"),
        (PythonicCalls, "[1, 2]"),
        (PythonicCalls, "[unknown(1)]"),
        (PythonicCalls, "[get_weather(city=__import__('os').getcwd())]"),
        (PythonicCalls, "[get_weather(**{'city': 1})]"),
        (PythonicCalls, "[get_weather(city=b'x')]"),
        (PythonicCalls, "[get_weather(city=" + "[" * 100),
        (PythonicCalls, "[get_weather(city="),
        (PythonicCalls, " no list"),
        (PythonicCalls, "<|python"),
        (GlmCalls, "<tool_call>unknown<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"),
        (GlmCalls, "<tool_call>get_wea"),
    ],
)
def test_what_calls_no_tool_of_ours_stays_text(kind: type[ToolParser], text: str) -> None:
    assert calls_in(kind, text) == (text, [])


@pytest.mark.parametrize(
    ("kind", "text", "arguments"),
    [
        (HermesCalls, '<tool_call>{"name": "get_weather", "arguments": {"city": "Par', '{"city": "Par'),
        (LlamaCalls, '{"name": "get_weather", "parameters": {"ci', '{"ci'),
        (GlmCalls, "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Par", '{"city": "Par'),
        (GlmCalls, "<tool_call>get_weather<arg_key>days</arg_key><arg_value>3", '{"days": '),
    ],
)
def test_a_call_that_is_cut_off_comes_as_far_as_it_was_written(
    kind: type[ToolParser], text: str, arguments: str
) -> None:
    assert read(text, lambda: kind(TOOLS)) == ("", "", [("get_weather", arguments)])


def test_arguments_are_told_while_they_are_written() -> None:
    parser = HermesCalls(TOOLS)
    assert parser.feed('<tool_call>{"name": "get_weather", "arguments": {"city": "Pa') == [
        CallStart(0, "get_weather"),
        CallArguments(0, '{"city": "Pa'),
    ]
    assert parser.feed("ris") == [CallArguments(0, "ris")]


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("city", "7", "7"),
        ("city", 'said "hi"\nthere', 'said "hi"\nthere'),
        ("days", "7", 7),
        ("days", "7.0", 7),
        ("days", "soon", "soon"),
        ("metric", "True", True),
        ("metric", "null", None),
        ("where", '{"lat": 1}', {"lat": 1}),
        ("where", "{'lat': 1}", {"lat": 1}),
        ("else", "[1, 2]", [1, 2]),
        ("else", "free text", "free text"),
    ],
)
def test_bare_values_of_glm_get_the_types_of_the_schema(key: str, written: str, value: object) -> None:
    text = f"<tool_call>get_weather<arg_key>{key}</arg_key><arg_value>{written}</arg_value></tool_call>"
    _, (call,) = calls_in(GlmCalls, text)
    assert call == ("get_weather", {key: value})
    assert type(call[1][key]) is type(value)


# --- reasoning ------------------------------------------------------------------------------------------------------


def reasoned(name: str, text: str, prompt: str = "<|im_start|>assistant\n", *, raw: bool = False) -> tuple[str, str]:
    form = REASONING[name]
    made = read(text, lambda: ReasoningParser(form, inside=form.begins_inside(prompt), raw=raw))
    return made[:2]


@pytest.mark.parametrize("name", ["qwen3", "think", "nemotron_nano_v3", "deepseek_r1"])
def test_reasoning_comes_apart(name: str) -> None:
    assert reasoned(name, "<think>\nOne, two.\n\n</think>\n\nThree. \n") == ("One, two.", "Three. \n")


def test_reasoning_that_the_prompt_has_opened() -> None:
    assert reasoned("qwen3", "One.\n</think>\n\nTwo.", "assistant\n<think>\n") == ("One.", "Two.")
    assert reasoned("deepseek_r1", "One.</think>Two.") == ("One.", "Two.")


def test_reasoning_that_the_prompt_has_closed() -> None:
    closed = "assistant\n<think>\n\n</think>\n\n"
    for name in REASONING:
        assert reasoned(name, "Two <think>.", closed) == ("", "Two <think>.")


def test_an_answer_without_an_opener_is_no_reasoning_unless_the_model_always_reasons() -> None:
    assert reasoned("qwen3", " Two.") == ("", " Two.")
    assert reasoned("deepseek_r1", " Two.") == ("Two.", "")


def test_reasoning_without_an_end_is_all_there_is() -> None:
    assert reasoned("qwen3", "<think>One </th") == ("One </th", "")
    assert reasoned("qwen3", "<thi") == ("", "<thi")


def test_raw_reasoning_keeps_every_letter() -> None:
    text = " <think>\nOne.\n</think>\n\nTwo. "
    reasoning, answer = reasoned("qwen3", text, raw=True)
    assert reasoning + answer == text
    assert answer == "\n\nTwo. "


# --- both -----------------------------------------------------------------------------------------------------------

ANSWER = '<think>call <tool_call>?</think>\nWell: <tool_call>{"name": "now", "arguments": {}}</tool_call>'


def parser(*, separate: bool, stream: bool = True) -> AnswerParser:
    reasoning = ReasoningParser(REASONING["qwen3"], inside=False, raw=not separate)
    return AnswerParser(reasoning, HermesCalls(TOOLS), separate=separate, stream=stream)


def test_calls_are_looked_for_behind_the_reasoning() -> None:
    assert read(ANSWER, lambda: parser(separate=True)) == ("call <tool_call>?", "Well:", [("now", "{}")])
    unseparated = read(ANSWER, lambda: parser(separate=False))
    assert unseparated == ("", "<think>call <tool_call>?</think>\nWell:", [("now", "{}")])


def test_reasoning_may_come_all_at_once() -> None:
    reader = parser(separate=True, stream=False)
    told = [piece for letter in ANSWER for piece in reader.feed(letter)] + reader.finish()
    assert [piece.text for piece in told if isinstance(piece, Reasoning)] == ["call <tool_call>?"]
    assert whole(told)[1:] == ("Well:", [("now", "{}")])


def test_of_calls_that_may_not_come_side_by_side_the_first_alone_is_told() -> None:
    text = '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "get_weather"}</tool_call>'
    assert read(text, lambda: AnswerParser(tools=HermesCalls(TOOLS), parallel=False)) == ("", "", [("now", "{}")])


def test_a_call_is_found_where_the_one_before_was_not_closed() -> None:
    text = '<tool_call>{"name": "now"} and <tool_call>{"name": "now"}</tool_call>'
    assert read(text, lambda: HermesCalls(TOOLS)) == ("", "", [("now", "{}"), ("now", "{}")])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (HermesCalls, '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"\\ud800\\"}"}</tool_call>'),
        (PythonicCalls, "[get_weather(city='\\ud800')]"),
        (
            GlmCalls,
            '<tool_call>get_weather<arg_key>where</arg_key><arg_value>{"a": "\\ud800"}</arg_value></tool_call>',
        ),
    ],
)
def test_arguments_with_half_a_surrogate_can_be_sent(kind: type[ToolParser], text: str) -> None:
    (call,) = read(text, lambda: kind(TOOLS))[2]
    assert "\\ud800" in call[1].encode().decode()
    assert json.loads(call[1])


def test_without_parsers_all_is_text() -> None:
    assert read(ANSWER, AnswerParser) == ("", ANSWER, [])


@pytest.mark.parametrize("name", FORMATS)
def test_random_garbage_never_breaks_a_parser(name: str) -> None:
    """However marks and brackets are mixed, the parser ends, and the same way however the text was cut."""
    words = ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "get_weather"]
    words += ["{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ":", "=", " ", "\n", '"name"', '"arguments"', "now"]
    words += ["<|python_tag|>", '{"name": "now", "arguments": ', "[now(", "city", "3", "é", "<think>", "</think>"]
    chance = random.Random(7)
    for _ in range(150):
        text = "".join(chance.choices(words, k=chance.randint(1, 12)))
        read(text, lambda: FORMATS[name].parser(TOOLS))


# --- registries -----------------------------------------------------------------------------------------------------


def test_a_models_template_tells_its_formats() -> None:
    assert tool_format("auto", "…<tool_call>\n{…}") is FORMATS["hermes"]
    assert tool_format("auto", "…<tool_call>…<arg_key>") is FORMATS["glm47"]
    assert tool_format("auto", '{"name": function name, "parameters": …}') is FORMATS["llama_json"]
    assert tool_format("auto", "[func_name1(params_name1=…)]") is FORMATS["pythonic"]
    assert tool_format("auto", None) is FORMATS["hermes"]
    assert tool_format("qwen", None) is FORMATS["hermes"]
    assert tool_format("none", "<tool_call>") is None
    assert reasoning_format("auto", "{%- if enable_thinking %}<think>") is REASONING["qwen3"]
    assert reasoning_format("auto", "<｜Assistant｜><think>") is REASONING["deepseek_r1"]
    assert reasoning_format("auto", "<|im_start|>") is None
    assert reasoning_format("none", "<think>") is None


def test_an_unknown_parser_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'hermes'.*pythonic"):
        tool_format("hermess", None)
    with pytest.raises(ConfigError, match="Did you mean 'qwen3'"):
        reasoning_format("qwen", None)
