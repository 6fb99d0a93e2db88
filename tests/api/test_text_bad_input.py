"""What clients must not send for text: each is one plain error, and the next chat is answered."""

from __future__ import annotations

import json
import random
import threading
import time
from typing import Any

import pytest

from tests.support.server import Server, assert_error, http, wait_for
from tests.support.text_fuzz import random_body
from tests.support.text_server import QUICK_CHAT, chat, events, idle, post

pytestmark = [pytest.mark.api]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def called(arguments: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def refused(server: Server, path: str, body: object, code: str, param: str | None, status: int = 400) -> str:
    return assert_error(post(server, path, body), status, code, param)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_value", "messages"),
        ({"messages": [3]}, "invalid_value", "messages"),
        ({"messages": None}, "invalid_value", "messages"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "invalid_value", "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "unsupported_parameter",
            "messages[0].content[0]",
        ),
        ({"messages": [{**USER, "colour": "red"}]}, "unknown_parameter", "messages[0]"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "unknown_parameter", "messages[0]"),
        ({"messages": [{**USER, "tool_calls": []}]}, "invalid_value", "messages[0].tool_calls"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            "invalid_value",
            "messages[0].tool_calls[0]",
        ),
        ({"messages": [called('{"a": ' + "[" * 900 + "]" * 900 + "}")]}, "invalid_value", "messages[0].tool_calls[0]"),
        ({"messages": [called('{"a": "\\ud800"}')]}, "invalid_value", "messages[0].tool_calls[0]"),
        ({"n": 0}, "invalid_n", "n"),
        ({"n": 10**9}, "invalid_n", "n"),
        ({"n": True}, "invalid_n", "n"),
        ({"n": 1.5}, "invalid_n", "n"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": -1, "max_tokens": None}, "invalid_value", "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_value", "max_tokens"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"temperature": 1e308}, "invalid_value", "temperature"),
        ({"top_p": 2}, "invalid_value", "top_p"),
        ({"seed": 2**64}, "invalid_value", "seed"),
        ({"seed": [1]}, "invalid_value", "seed"),
        ({"stop": ["a"] * 17}, "invalid_value", "stop"),
        ({"stop": [1]}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"logprobs": 5}, "invalid_value", "logprobs"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 10**6}, "invalid_value", "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {str(at): 1 for at in range(1025)}}, "invalid_value", "logit_bias"),
        ({"stop_token_ids": [10**9]}, "invalid_value", "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "unknown_parameter", "stream_options"),
        ({"stream": "yes"}, "invalid_value", "stream"),
        ({"priority": 1}, "invalid_value", "priority"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"chat_template": "{{ messages }}"}, "unsupported_parameter", "chat_template"),
        ({"chat_template_kwargs": {"messages": 1}}, "invalid_value", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a b": 1}}, "invalid_value", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": [1]}}, "invalid_value", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": "y" * 1000}}, "invalid_value", "chat_template_kwargs"),
        ({"chat_template_kwargs": {f"x{at}": 1 for at in range(17)}}, "invalid_value", "chat_template_kwargs"),
        ({"functions": [TOOL]}, "unsupported_parameter", "functions"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort"),
        ({"prompt_embeds": "gASV"}, "unsupported_parameter", "prompt_embeds"),
        ({"mm_processor_kwargs": {}}, "unsupported_parameter", "mm_processor_kwargs"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format"),
        ({"response_format": {"type": "json_object", "x": 1}}, "unknown_parameter", "response_format"),
        ({"regex": "a", "ebnf": "root ::= \"a\""}, "invalid_value", "ebnf"),
        ({"regex": "a" * 300_000}, "invalid_value", "regex"),
        ({"tools": [{"type": "retrieval"}]}, "unsupported_parameter", "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "invalid_value", "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [TOOL] * 2}, "invalid_value", "tools"),
        ({"tools": [TOOL] * 129}, "invalid_value", "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "invalid_value",
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "invalid_value",
         "tool_choice"),
    ],
)  # fmt: skip
def test_a_chat_that_is_wrong_names_its_field(
    shared_text_server: Server, fields: dict[str, Any], code: str, param: str
) -> None:
    refused(shared_text_server, CHAT, {**QUICK_CHAT, **fields}, code, param)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [[]]}, "invalid_value", "prompt"),
        ({"prompt": None}, "invalid_value", "prompt"),
        ({"prompt": [-1]}, "invalid_value", "prompt"),
        ({"prompt": [10**12]}, "invalid_value", "prompt"),
        ({"prompt": ["a", 3]}, "invalid_value", "prompt"),
        ({"prompt": ["a"] * 129}, "invalid_value", "prompt"),
        ({"prompt": [-1], "echo": True}, "invalid_value", "prompt"),
        ({"prompt": [2**40], "echo": True}, "invalid_value", "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "invalid_n", "n"),
        ({"logprobs": 10**6}, "invalid_value", "logprobs"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"echo": True, "logprobs": 1, "stream": True}, "unsupported_parameter", "echo"),
        ({"messages": [USER]}, "unknown_parameter", "messages"),
    ],
)
def test_a_completion_that_is_wrong_names_its_field(
    shared_text_server: Server, fields: dict[str, Any], code: str, param: str
) -> None:
    refused(shared_text_server, COMPLETIONS, {"prompt": "hi", "max_tokens": 1, **fields}, code, param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/tokenize", {}, "prompt"),
        ("/v1/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/v1/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/v1/tokenize", {"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ("/v1/detokenize", {"tokens": [-1]}, "tokens"),
        ("/v1/detokenize", {"tokens": [10**12]}, "tokens"),
        ("/v1/detokenize", {"tokens": "1"}, "tokens"),
    ],
)
def test_tokens_that_are_wrong_name_their_field(
    shared_text_server: Server, path: str, body: dict[str, Any], param: str
) -> None:
    refused(shared_text_server, path, body, "invalid_value", param)


def test_a_full_context_is_told_with_both_numbers(text_server: Server) -> None:
    long = {"role": "user", "content": "word " * 9000}
    message = refused(text_server, CHAT, {"messages": [long]}, "context_length_exceeded", "messages")
    assert "8,192" in message
    assert "9,0" in message
    body = {"messages": [USER], "max_completion_tokens": 8192}
    message = refused(text_server, CHAT, body, "context_length_exceeded", "max_completion_tokens")
    assert message.count("8,1") >= 2
    refused(text_server, COMPLETIONS, {"prompt": "word " * 9000}, "context_length_exceeded", "prompt")


def test_bodies_that_are_too_much_are_refused_at_once(text_server: Server) -> None:
    many = {"messages": [USER] * 10_000}
    refused(text_server, CHAT, many, "invalid_json", None)
    refused(text_server, CHAT, {"messages": [USER], "stop": ["x"] * 20_000}, "invalid_json", None)
    refused(text_server, CHAT, b'{"messages": ' + b"[" * 1000 + b"]" * 1000 + b"}", "invalid_json", None)
    refused(text_server, CHAT, json.dumps({"messages": [{**USER, "content": "x" * 2_000_000}]}).encode(),
            "body_too_large", None, 413)  # fmt: skip


@pytest.mark.parametrize(
    "content", ["\x00\x01\x1b[31m", "\u202eabc", "\ud7ff\ue000\uffff", "🏳️‍🌈" * 50, "<|im_end|>" * 50]
)
def test_strange_letters_are_answered(text_server: Server, content: str) -> None:
    assert chat(text_server, content, max_tokens=2)["choices"]


def test_half_a_surrogate_is_refused(text_server: Server) -> None:
    refused(text_server, CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json", None)


def test_other_models_are_not_found(text_server: Server) -> None:
    for name in ("gpt-4", "../x", "meta-llama/Llama-3", "smollm3"):
        message = refused(text_server, CHAT, {**QUICK_CHAT, "model": name}, "model_not_found", "model", 404)
        assert "smollm2" in message
    refused(text_server, COMPLETIONS, {"prompt": "a", "model": "gpt-4"}, "model_not_found", "model", 404)


def test_a_server_of_pictures_says_how_to_get_text(server: Server) -> None:
    for path, body in ((CHAT, QUICK_CHAT), (COMPLETIONS, {"prompt": "a"}), ("/v1/tokenize", {"prompt": "a"})):
        message = refused(server, path, body, "unsupported_endpoint", None)
        assert "--llm-path" in message


def test_health_answers_while_a_large_prompt_is_read(text_server: Server) -> None:
    body = json.dumps({"prompt": "word, " * 150_000}).encode()
    slowest = 0.0
    with_text = http("POST", "/v1/tokenize", body)
    worker = threading.Thread(target=lambda: text_server.exchange(with_text))
    worker.start()
    while worker.is_alive():
        started = time.perf_counter()
        assert text_server.get("/health/live").status_code == 200
        slowest = max(slowest, time.perf_counter() - started)
    worker.join()
    assert slowest < 1.0


def test_an_error_while_a_stream_is_written_is_its_last_event(text_server: Server) -> None:
    body = {"messages": [USER], "max_tokens": 4000, "ignore_eos": True, "stream": True, "deadline_s": 1.5}
    text = post(text_server, CHAT, body).text
    last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "deadline_exceeded"
    with pytest.raises(AssertionError):
        events(text)


def test_no_mixture_of_fields_breaks_the_server(text_server: Server) -> None:
    """Right and wrong values side by side: an answer or one plain error each time, and nothing is left behind."""
    rng, codes = random.Random(9), set[int]()
    for _ in range(300):
        path, body = random_body(rng)
        response = post(text_server, path, body)
        codes.add(response.status_code)
        if response.status_code == 200:
            stream = response.headers["content-type"].startswith("text/event-stream")
            assert events(response.text) if stream else response.json(), (path, body)
            continue
        assert response.status_code in (400, 404), (path, body, response.text[:500])
        error = response.json()["error"]
        assert_error(response, response.status_code, error["code"], error["param"])
    assert {200, 400} <= codes
    wait_for(lambda: idle(text_server), 10, "the end of all texts")
