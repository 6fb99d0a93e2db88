"""Answers of a given form, and tools: what SmolLM2 would never write by itself."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.support.random_schemas import random_schema
from tests.support.server import Server, assert_error
from tests.support.text_server import MODEL, chat, post

pytestmark = [pytest.mark.api]

CHAT = "/v1/chat/completions"
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["city", "days"],
    },
}
NOW = {"name": "now", "description": "The time of day."}
TOOLS: list[Any] = [{"type": "function", "function": function} for function in (WEATHER, NOW)]
QUESTION = "How will the weather be in Paris, for three days?"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}


@pytest.fixture
def client(text_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=text_server.base_url + "/v1", api_key="none", max_retries=0)


def messages(content: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": content}]


def forms(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def content(answer: dict[str, Any]) -> str:
    assert answer["choices"][0]["finish_reason"] == "stop", answer
    text = answer["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_matches_its_schema(text_server: Server, temperature: int) -> None:
    answer = chat(
        text_server, "Invent a person.", response_format=forms(PERSON), max_tokens=120, temperature=temperature, seed=3
    )
    jsonschema.validate(json.loads(content(answer)), PERSON)


def test_answers_match_regular_expressions_and_grammars(text_server: Server) -> None:
    assert re.fullmatch("[0-9]{3}-[a-z]{2,4}", content(chat(text_server, "A code!", regex="[0-9]{3}-[a-z]{2,4}")))
    assert content(chat(text_server, "Yes or no?", ebnf='root ::= "aye" | "nay"')) in ("aye", "nay")
    parts = [{"type": "const_string", "value": "Well, "}, {"type": "regex", "pattern": "[a-z]{3}"}]
    tag = {"type": "sequence", "elements": parts}
    text = content(chat(text_server, "Say it.", response_format={"type": "structural_tag", "format": tag}))
    assert re.fullmatch("Well, [a-z]{3}", text)
    body = {"prompt": "Answer:", "regex": "(yes|no)", "max_tokens": 5}
    assert post(text_server, "/v1/completions", body).json()["choices"][0]["text"] in ("yes", "no")


def test_a_required_call_names_a_tool_and_its_arguments_match(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=messages(),
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=80,
        seed=1,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    schema = {"get_weather": WEATHER["parameters"], "now": {"type": "object", "maxProperties": 0}}[call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), schema)


def test_a_tools_schema_may_begin_with_a_reference(client: openai.OpenAI) -> None:
    inner = {"type": "object", "properties": {"day": {"$ref": "#/$defs/day"}}, "required": ["day"]}
    parameters = {"$ref": "#/$defs/it", "$defs": {"it": inner, "day": {"enum": ["Mon", "Tue"]}}}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=messages(),
        tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=60,
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments)["day"] in ("Mon", "Tue")


def test_a_named_tool_is_called_once_and_the_stream_says_the_same(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {
        "model": MODEL, "messages": messages(), "tools": TOOLS, "temperature": 0, "max_tokens": 80,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    }  # fmt: skip
    (call,) = client.chat.completions.create(**common).choices[0].message.tool_calls or []
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["parameters"])
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**common, stream=True)]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or []]
    assert {part.index for part in parts} == {0}
    assert [part.function.name for part in parts if part.function and part.function.name] == ["get_weather"]
    assert "".join(part.function.arguments or "" for part in parts if part.function) == call.function.arguments
    assert len(parts) > 3  # as they were written
    assert parts[0].id is not None
    assert chunks[-1].finish_reason == "tool_calls"


class Pet(BaseModel):
    name: str = Field(max_length=8)
    kind: Literal["cat", "dog"]


class Owner(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=120)
    pet: Pet | None


def test_the_clients_own_helpers_parse_answers_and_streams(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": MODEL, "messages": messages("Invent somebody with a pet."), "max_tokens": 120}
    answer = client.chat.completions.parse(**common, response_format=Owner)
    assert isinstance(answer.choices[0].message.parsed, Owner)
    with client.chat.completions.stream(**common, response_format=Owner) as stream:
        assert {"content.delta", "content.done"} <= {event.type for event in stream}
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Owner)
    tool = openai.pydantic_function_tool(Pet)
    forced: dict[str, Any] = {**common, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = client.chat.completions.parse(**forced).choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Pet)


def test_several_choices_call_for_themselves(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=messages(),
        tools=TOOLS,
        tool_choice="required",
        n=3,
        temperature=1.5,
        seed=5,
        max_tokens=40,
    )
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or []]
    assert len(ids) >= 3
    assert len(set(ids)) == len(ids)


def test_a_model_that_calls_by_itself_is_understood(client: openai.OpenAI) -> None:
    """It has been shown how, in the format that it is told of, and nothing forces it."""
    shown: list[Any] = []
    for at, city in enumerate(("Rome", "Madrid", "Tokyo")):
        call = {"id": f"c{at}", "type": "function"}
        call = {**call, "function": {"name": "get_weather", "arguments": json.dumps({"city": city, "days": 3})}}
        shown += [
            {"role": "user", "content": f"How will the weather be in {city}, for three days?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{at}", "content": "Sunny."},
            {"role": "assistant", "content": "It will be sunny."},
        ]
    common: dict[str, Any] = {
        "model": MODEL, "messages": [*shown, *messages()], "tools": TOOLS[:1], "temperature": 0, "max_tokens": 60,
    }  # fmt: skip
    choice = client.chat.completions.create(**common).choices[0]
    (found,) = choice.message.tool_calls or []
    assert (choice.finish_reason, choice.message.content, found.function.name) == ("tool_calls", None, "get_weather")
    assert json.loads(found.function.arguments) == {"city": "Paris", "days": 3}
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**common, stream=True)]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or []]
    assert "".join(part.function.arguments or "" for part in parts if part.function) == found.function.arguments
    assert not any(chunk.delta.content for chunk in chunks)


def test_with_both_a_format_and_tools_the_answer_is_one_of_them(text_server: Server) -> None:
    answer = chat(
        text_server, QUESTION, tools=TOOLS, response_format=forms(PERSON), max_tokens=120, parallel_tool_calls=False
    )
    message = answer["choices"][0]["message"]
    if message.get("tool_calls"):
        assert message["content"] is None
    else:
        jsonschema.validate(json.loads(message["content"]), PERSON)


def test_the_choice_of_no_tool_is_text(text_server: Server) -> None:
    message = chat(text_server, QUESTION, tools=TOOLS, tool_choice="none")["choices"][0]["message"]
    assert message["content"]
    assert "tool_calls" not in message


def test_strict_tools_leave_the_choice_to_the_model(text_server: Server) -> None:
    tools = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    message = chat(text_server, QUESTION, tools=tools)["choices"][0]["message"]
    assert message["content"] or message["tool_calls"]


CATASTROPHE = ".{1,1000000}"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"regex": "(["}, "regex"),
        ({"regex": CATASTROPHE}, "regex"),
        ({"ebnf": "root ::= missing"}, "ebnf"),
        ({"ebnf": "no grammar at all"}, "ebnf"),
        ({"response_format": forms({"type": "strange"})}, "response_format"),
        ({"response_format": forms({"$ref": "#"})}, "response_format"),
        ({"response_format": forms({"$ref": "https://example.com/schema.json"})}, "response_format"),
        ({"response_format": forms({"type": "string", "pattern": "(["})}, "response_format"),
        ({"response_format": forms({"not": {"type": "string"}})}, "response_format"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "nonsense"}}}, "response_format"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/x"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_a_rule_that_cannot_be_kept_is_refused_soon(text_server: Server, fields: dict[str, Any], param: str) -> None:
    chat(text_server, "warm", regex="[ab]", max_tokens=1)  # the helper is ready
    started = time.perf_counter()
    response = post(text_server, CHAT, {"messages": messages(), "max_tokens": 5, **fields})
    assert_error(response, 400, "invalid_value", param)
    assert time.perf_counter() - started < 4.0


def test_one_schema_for_many_requests(text_server: Server) -> None:
    schema = {"type": "object", "properties": {"k": {"enum": ["a", "b"]}}, "required": ["k"]}
    with ThreadPoolExecutor(8) as pool:
        ask = [pool.submit(chat, text_server, f"{at}", response_format=forms(schema), max_tokens=30) for at in range(8)]
        for answer in ask:
            jsonschema.validate(json.loads(content(answer.result())), schema)


@pytest.mark.slow
def test_answers_to_two_hundred_random_schemas_are_valid(text_server: Server) -> None:
    """Through the official client, sixteen at a time. A bias towards the ends of things keeps answers short."""
    client = openai.OpenAI(base_url=text_server.base_url + "/v1", api_key="none", max_retries=0, timeout=600)
    ends = ['"', '",', '"}', "}", "]", '":', ' "', "}}", "]}"]
    tokens = [post(text_server, "/v1/tokenize", {"prompt": end}).json()["tokens"] for end in ends]
    bias = {str(ids[0]): 6 for ids in tokens if len(ids) == 1}
    assert len(bias) > 4
    rng = random.Random(26)
    schemas = [random_schema(rng) for _ in range(200)]

    def ask(at: int) -> str | None:
        for _ in range(10):
            with contextlib.suppress(openai.BadRequestError):  # a busy machine compiled it too slowly
                answer = client.chat.completions.create(
                    model=MODEL,
                    messages=messages("Give an example."),
                    response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schemas[at]}},
                    logit_bias=bias,  # type: ignore[arg-type]
                    max_tokens=250,
                    seed=at,
                )
                break
        choice = answer.choices[0]
        return choice.message.content if choice.finish_reason == "stop" else None

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(len(schemas))))
    ended = 0
    for schema, answer in zip(schemas, answers, strict=True):
        if answer is not None:  # else cut off at the limit
            ended += 1
            jsonschema.validate(json.loads(answer), schema)
    assert ended >= 190, ended
